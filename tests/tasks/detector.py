"""A user's network with two outputs, and the task for it: where is the bright pixel?"""

import torch
from torch import nn


class Finder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.map, self.size = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.body(x)
        return self.map(x), self.size(x)


class Find:
    main, higher_is_better = "misses", False

    def __init__(self):
        self.missed = []

    def data(self, place, part):
        random = torch.Generator().manual_seed(len(part))
        samples = []
        for _ in range(40):
            image, at = torch.rand(1, 6, 6, generator=random) / 2, int(torch.randint(36, (), generator=random))
            image.view(-1)[at] = 2
            samples.append((image, {"at": at}))
        return None if part == "validation" else samples

    def loss(self, outputs, targets):
        scores, size = outputs
        return nn.functional.cross_entropy(scores.flatten(1), self._places(targets)) + size.square().mean()

    def update(self, outputs, targets):
        self.missed += (outputs[0].flatten(1).argmax(1) != self._places(targets)).tolist()

    def compute(self):
        return {"misses": sum(self.missed) / len(self.missed), "seen": len(self.missed)}

    def _places(self, targets):
        return torch.tensor([target["at"] for target in targets])


class Broken(Find):
    def loss(self, outputs, targets):
        return outputs.sum()


class NoNumbers(Find):
    def compute(self):
        return {"other": 1}


class Hits(Find):
    main, higher_is_better = "accuracy", True

    def compute(self):
        return {"accuracy": 1 - sum(self.missed) / len(self.missed), **super().compute()}


class Half:
    main = "x"

    def data(self, place, part): ...
    def loss(self, outputs, targets): ...
