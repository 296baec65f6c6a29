"""What a study finds beside the verdicts on losses: `learning_curves` (steps to a loss, since when an arm is behind),
`further` (the noise floor, and whether a large batch costs adapters more).
"""
