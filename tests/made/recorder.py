"""A stand-in for a GPU's graphs: what is recorded is done again at a replay, into the same places."""

import torch
from torch.utils._pytree import tree_leaves


class FakeRecorder:
    """Records as :class:`gspn_dit.cuda_graphs.Recorder` says, on any device.

    Args:
        error: Raised by every recording.
        off_by: Added to what a replay gives: a recording that computes something else.
        parameters: Whose gradients a recording makes, and a replay writes over.
    """

    def __init__(self, error=None, off_by=0.0, parameters=()):
        self.error, self.off_by, self.parameters = error, off_by, list(parameters)
        self.rehearsals = self.recordings = self.replays = 0

    def rehearse(self, work):
        self.rehearsals += 1
        return work()

    def record(self, work):
        if self.error is not None:
            raise self.error
        assert all(p.grad is None for p in self.parameters), "a replay would add to what there is"
        self.recordings += 1
        result = work()
        gradients = [p.grad for p in self.parameters]
        places = [*tree_leaves(result), *gradients]
        for place in places:
            place.data.fill_(float("nan"))  # a recording computes nothing

        def replay():
            self.replays += 1
            for p in self.parameters:
                p.grad = None
            new = [*tree_leaves(work()), *(p.grad for p in self.parameters)]
            for place, tensor in zip(places, new, strict=True):
                place.data.copy_(tensor.data + self.off_by)
            for p, gradient in zip(self.parameters, gradients, strict=True):
                p.grad = gradient

        return result, replay


class FakeGraphs(FakeRecorder):
    """In the place of CudaRecorder, where a device is given to it; the last one that was made is `made`."""

    made = None

    def __init__(self, device):
        super().__init__()
        assert isinstance(device, torch.device)
        type(self).made = self
