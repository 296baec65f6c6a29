"""The end of a run: `end_of_run` (the callback), `loss_curve` (its picture), `run_story` (what a run says of itself in
``events.jsonl``) and `next_commands` (what to type next).
"""
