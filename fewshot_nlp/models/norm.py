"""Which statistics batch norms normalise with (Ioffe and Szegedy 2015): a choice that changes what a result means.

*Inductive*: the running statistics of pre-training, which no call changes; every image is answered alone.
*Transductive*: those of the batch at hand, so that the answer to a query depends on the others beside it. Published
figures of MAML and its kin on images are of this kind (Bronskill et al., TaskNorm, ICML 2020, arXiv:2003.03284).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm


class BatchStatistics(nn.BatchNorm2d):
    """A batch norm that normalises with its batch. The running statistics it was loaded with stay, and stay unread."""

    @classmethod
    def of(cls, norm: _BatchNorm) -> BatchStatistics:
        """``norm`` with the same tensors under the same names."""
        found = cls(norm.num_features, norm.eps, affine=norm.affine)
        found.weight, found.bias = norm.weight, norm.bias
        for name, value in norm.named_buffers(recurse=False):
            setattr(found, name, value)
        return found

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == input.shape[1]:
            raise ValueError(
                "One image has no statistics for a transductive batch norm, whose map is of 1 by 1 places there. Give "
                "2 images or more at once, larger ones (image_size), or use batch_norm='inductive'."
            )
        return batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)


def batch_norms(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """The batch norms of ``module`` by name."""
    return [(name, part) for name, part in module.named_modules() if isinstance(part, _BatchNorm)]


def is_transductive(module: nn.Module) -> bool:
    """Whether what ``module`` makes of an input depends on the others of its batch."""
    return any(isinstance(n, BatchStatistics) or n.running_mean is None for _, n in batch_norms(module))


def set_batch_norm(module: nn.Module, mode: str | None) -> None:
    """Let the batch norms of ``module`` be ``"inductive"`` or ``"transductive"``; as they are if ``None``.

    Raises:
        ValueError: there are none, or none with running statistics.
    """
    norms = batch_norms(module)
    if mode is not None and not norms:
        raise ValueError(
            f"batch_norm={mode!r} is for backbones with batch norms, and {type(module).__name__} has none: it answers "
            f"every input alone. Leave it out."
        )
    if mode == "inductive" and is_transductive(module):
        raise ValueError(
            f"batch_norm='inductive' needs running statistics, and {type(module).__name__} keeps none. Use "
            f"'transductive', or a network of norm='group'."
        )
    if mode == "transductive":
        for name, norm in norms:
            module.set_submodule(name, BatchStatistics.of(norm))
