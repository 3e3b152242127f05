"""The values of nf4's sixteen codes: NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

Quantiles of the normal distribution over their largest, eight above zero, zero itself, seven below; in float32, as
bitsandbytes stores them. A weight is the value of its code times its group's largest magnitude.
"""

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
