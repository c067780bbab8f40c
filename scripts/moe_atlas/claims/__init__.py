"""The paper's claims as tests: tables of one model in, a verdict for each claim out.

A claim is a row of config/claims.tsv. Its estimator gives a value, an interval, the value under a null, and a
one-sided p in the claimed direction. This is the whole rule:

1. *cannot be told* where there are fewer layers, experts or blocks of documents than the row asks for, or where the
   smallest p that the test can give on so few is above the row's level. The reason says which. No p is used then.
2. The other p values of one model, over all its claims and texts, are adjusted by Holm's method.
3. *does not hold* where the whole interval is less than the row's margin away from the null: whatever there is, it is
   smaller than what the claim means. Also where the whole interval is on the other side of the null.
4. *holds* where the adjusted p is below the level and the whole interval is on the claimed side of the null.
5. *cannot be told* in every other case.

A holding claim is wrong with probability at most the level; over all claims of one model too, by Holm's method.
Inference from experts (permutation, jackknife) asks whether other experts of the same kind would show it, inference
from documents whether other text would. Where a claim has its interval from one and its p from the other, it needs
both.
"""
