"""What Lightning 2.6 offers, feature by feature, with adapters: `docs/evidence/lightning.md` names these tests."""
