"""IterIS and RegMean: merges whose every layer is a least-squares problem in the features of sample inputs.

`samples` reads the data, `layers` knows what the adapters add to a layer, `features` runs the models and adds up inner
products of features, `equations` holds and solves the normal equations, `solver` goes through the sweeps, `state` keeps
them on disk, `solution` is what comes out.
"""

from lorakern.merge.iteris.solution import Solution, Truncation
from lorakern.merge.iteris.solver import regmean, solve

__all__ = ["Solution", "Truncation", "regmean", "solve"]
