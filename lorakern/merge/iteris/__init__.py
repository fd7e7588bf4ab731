"""IterIS and RegMean: merges whose every layer is a least-squares problem in the features of sample inputs.

`solver` is what users call and `arguments` what it takes; `samples` reads the data, `layers` knows what adapters add
to a layer, `features` runs the models and adds up inner products of features, `equations` solves one layer, `sweeps`
all of them time and again, `state` keeps that on disk, and `solution` is what comes out.
"""

from lorakern.merge.iteris.solution import Solution, Truncation
from lorakern.merge.iteris.solver import objective, regmean, solve

__all__ = ["Solution", "Truncation", "objective", "regmean", "solve"]
