"""The shipped models: how they are built and trained, their learning curves, and their weights in `moe/` and `dense/`.

How these weights came to be, on one H100 (`curves/` holds the logs):
1. tower, 1,200 steps with the heads for characters and words only (`tower-reading.jsonl`);
2. tower again from there, 2,200 steps with all heads (`moe.jsonl`); both models start from this tower;
3. joint, 6,500 steps of 256 pictures with 8 questions each for the MoE (404 s) and for the dense twin (343 s).
A run of `train.py moe` without `--tower` makes step 2 from a fresh tower. Held out, every token right: charts
98.4 % (MoE) and 98.4 % (dense), documents 100 % both: these tasks do not tell the two apart.

What failed before: questions and transcription alone, with the word heads: titles, dates and totals were read after
500 steps, but values under a bar's name stayed at 22 % for 3,300 steps (0.8 M pictures). Naming each value's row and
column and each mark's colour in the tower stage made the same questions right to 96 % after 645 joint steps.
"""
