"""The shipped models: how they are built and trained, their learning curves, and their weights in `moe/`, `dense/` and
`dense-total/` (packed as int8, see packed.py).

How these weights came to be, on one H100 (`curves/` holds the logs):
1. tower, 1,200 steps with the heads for characters and words only (`tower-reading.jsonl`);
2. tower again from there, 2,200 steps with all heads (`moe.jsonl`); the MoE and the dense twin start from it;
3. joint, 6,500 steps of 256 pictures with 8 questions each for the MoE (404 s) and for the dense twin (343 s).
The larger twin (`train.py dense-total`) made step 2 from a fresh tower and was stopped in step 3 at a time limit, after
about 6,180 of the 6,500 steps (`dense-total.jsonl`). Held out, every token right: charts 98.4 % (MoE), 98.4 % (dense)
and 99.2 % (larger, at step 5,618), documents 100 %: these tasks hardly tell them apart.

What failed before: questions and transcription alone, with the word heads: titles, dates and totals were read after
500 steps, but values under a bar's name stayed at 22 % for 3,300 steps (0.8 M pictures). Naming each value's row and
column and each mark's colour in the tower stage made the same questions right to 96 % after 645 joint steps.
"""
