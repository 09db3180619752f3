# SPDX-License-Identifier: MIT
"""The lookahead paper, reproduced: python -m benchmarks.paper (Park et al., ICLR 2020).

    train a dense net -> prune it by each method to each level -> fine-tune with the masks kept

All methods start from the same dense weights of a seed, keep the same number of weights and are
fine-tuned on the same batches. nets.py and settings.py hold the paper's networks and numbers,
methods.py what is compared, data.py the data, training.py the loop, experiment.py the order of
things, store.py the finished cells (a stopped run goes on where it was), report.py table and plot.
"""
