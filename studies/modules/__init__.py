"""Small modules and data for the studies of this folder: a GPT that is pre-trained in a minute, and three tasks.

`tiny_gpt` (the network, dense or with experts), `rows` (random facts, a Markov text, copying), `base` (pre-training,
done once and kept in ``runs/bases``), `task` (`TinyTask` and `TinyData`, which configs name), `curves` (a plain
training loop for scripts), `digits` (tasks that a reward can check), `reward_curves` (what the curves of its runs
say), `pages` (what scripts write), `tables` (the tables of a page).
"""
