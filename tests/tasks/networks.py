"""Networks that no image classifier's code fits: two inputs, two outputs, text, a detector, a segmenter."""

import torch
from torch import nn


class TwoInputs(nn.Module):
    """A grey, non-square image and text ids; a dict of scores and a map of boxes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.embedding, self.scores, self.boxes = nn.Embedding(20, 8), nn.Linear(16, 3), nn.Conv2d(8, 5, 1)

    def forward(self, image, ids):
        x = self.norm(self.conv(image)).relu()
        both = torch.cat([x.mean((2, 3)), self.embedding(ids).mean(1)], 1)
        return {"scores": self.scores(both), "boxes": self.boxes(x)}


class Segmenter(nn.Module):
    """Scores for three classes at half of the image's size."""

    def __init__(self, channels=1):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu())


class LeavesEarly(nn.Module):
    """Returns early for some values, so that no graph describes it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        if x.sum() > 1e9:
            return x
        return self.head(x)


class Steps(nn.Module):
    """Loops over time steps, (N, steps, 6)."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = x.new_zeros(len(x), 8)
        for step in range(x.size(1)):
            state = self.cell(x[:, step], state)
        return self.head(state)


class Untrained(nn.Module):
    """Ends in a layer of zeros, as residual networks may begin."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.stem(x))


class Particular(nn.Module):
    """Refuses all inputs, in words of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        raise ValueError(f"{len(x)} is no number of samples for {self.head}")


class Twice(nn.Module):
    """A layer called twice: its bias cannot be rounded to one unit, and there is no batch norm."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x).relu())
