"""Small modules and data for the studies of this folder: a GPT that is pre-trained in a minute, and three tasks.

`tiny_gpt` (the network, dense or with experts), `rows` (random facts, a Markov text, copying), `base` (pre-training,
done once and kept in ``runs/bases``), `task` (`TinyTask` and `TinyData`, which configs name), `curves` (a plain
training loop for scripts), `pages` (what scripts write).
"""
