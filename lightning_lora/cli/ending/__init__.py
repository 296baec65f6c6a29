"""The end of a run: `end_of_run` (the callback), `loss_curve` (its picture) and `next_commands` (what to type next)."""
