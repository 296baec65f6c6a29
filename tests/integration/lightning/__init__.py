"""What Lightning 2.6 offers, feature by feature, with adapters: `docs/lightning.md` names these tests."""
