"""Small networks with adapters and samples, and IterIS written densely in float64 to compare with."""

from itertools import pairwise

import torch
from merging import factors, update

from lorakern.adapters import LoraFactors


class Problem:
    """A ReLU network, N adapters of all its layers, and a batch or more of features per task."""

    def __init__(self, sizes=(7, 9, 8, 6, 5), count=2, tokens=(40, 33), seed=0, scale=0.4):
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
        modules = [module for layer in layers for module in (layer, torch.nn.ReLU())][:-1]
        self.model = torch.nn.Sequential(*modules)
        self.names = [str(2 * i) for i in range(len(layers))]
        self.adapters = [
            {
                name: LoraFactors(*factors(layer.out_features, layer.in_features, 2 + i, scale, seed=9 * i + int(name)))
                for name, layer in zip(self.names, layers, strict=True)
            }
            for i in range(count)
        ]
        self.samples = [[torch.randn(n, sizes[0]) + i for n in tokens] for i in range(count)]

    def weight(self, name):
        return self.model.get_submodule(name).weight.detach().double()

    def deltas(self, name):
        return [update(adapter[name]) for adapter in self.adapters]

    def inputs(self, i, added):
        """Module to its input on the samples of task i, in float64, with the weights W0 + added[module]."""
        x, seen = torch.cat(self.samples[i]).double(), {}
        for name, module in self.model.named_children():
            if isinstance(module, torch.nn.Linear):
                seen[name] = x
                x = x @ (self.weight(name) + added[name]).T + module.bias.detach().double()
            else:
                x = x.relu()
        return seen

    def dense(self, iterations, alpha=0.0, lambdas="full", target="delta", coefficients=None, ratio=0.0):
        """(updates after so many sweeps, the objective of that model), by the formulas as they stand."""
        N = len(self.adapters)
        c = coefficients or [1.0] * N
        base = {name: self.weight(name) * (target == "full") for name in self.names}
        task = [self.inputs(i, {name: self.deltas(name)[i] for name in self.names}) for i in range(N)]
        W = {name: [base[name] + delta for delta in self.deltas(name)] for name in self.names}
        lam = {}
        for name in self.names:
            of = [delta + self.weight(name) * (lambdas == "full") for delta in self.deltas(name)]
            ratios = [w.square().sum() / (task[i][name] @ w.T).square().sum() for i, w in enumerate(of)]
            lam[name] = [c[i] * (1.0 if lambdas is None else ratios[i]) for i in range(N)]
        updates, features = {}, task
        for _ in range(iterations):
            new = {}
            for name in self.names:
                left = right = 0.0
                for i in range(N):
                    X = task[i][name]
                    Y = (1 - ratio) * features[i][name] + ratio * X
                    G, C, one = Y.T @ Y, X.T @ Y, torch.eye(X.shape[1], dtype=torch.float64)
                    left = left + lam[name][i] * (G + alpha * G.norm() * one)
                    right = right + lam[name][i] * W[name][i] @ (C + alpha * C.norm() * one)
                new[name] = torch.linalg.solve(left.T, right.T).T - base[name]
            updates = new
            features = [self.inputs(i, updates) for i in range(N)]
        objective = sum(
            lam[name][i]
            * (
                task[i][name] @ W[name][i].T
                - ((1 - ratio) * features[i][name] + ratio * task[i][name]) @ (base[name] + updates[name]).T
            )
            .square()
            .sum()
            for name in self.names
            for i in range(N)
        )
        return updates, float(objective)
