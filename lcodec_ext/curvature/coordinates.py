"""The vector of a selection's parameters: read, overwritten, added to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from lcodec_ext._torch.names import own_name
from lcodec_ext.curvature.layout import Layout


class Coordinates(ABC):
    """A selection of parameters, of units or single ones, whose coordinates form a vector."""

    __slots__ = ()

    @abstractmethod
    def layout(self, model: nn.Module) -> Layout:
        """Find the selection in a model; for many calls of `gather` and its like."""

    @abstractmethod
    def __len__(self) -> int:
        """How many are selected."""

    def size(self, model: nn.Module) -> int:
        """Count the coordinates: the trainable parameters of a model that are selected."""
        return self.layout(model).size

    def gather(
        self, source: nn.Module | Mapping[str, Tensor], *, model: nn.Module | None = None
    ) -> Tensor:
        """Collect the selected entries of a model's parameters, or of tensors of their shapes.

        Parameters
        ----------
        source : Module or mapping of str to Tensor
            Tensors by parameter name, gradients for instance: at least those that have
            selected entries, of the shapes of the parameters and on one device.
        model : Module, optional
            The model of the selection; given with a mapping, and only then.

        Returns
        -------
        Tensor, shape (size(model),)
            A copy, in the tensors' dtype (the promoted one where they differ) and on their device;
            for an empty selection, in those of the model's first parameter. Differentiable by the
            tensors. O(size(model)).

        Raises
        ------
        ValueError, TypeError
            For what the class refuses, and for tensors that are missing or of another shape.
        """
        layout, tensors = self._lay_out(source, model, "source")
        return layout.gather(tensors)

    def scatter_(
        self,
        target: nn.Module | Mapping[str, Tensor],
        vector: Tensor,
        *,
        model: nn.Module | None = None,
    ) -> None:
        """Overwrite the selected entries in place, the reverse of `gather`; others stay.

        Parameters
        ----------
        target, model
            As source and model of `gather`.
        vector : Tensor, shape (size(model),)
            Converted to the dtype and device of each tensor.

        Raises
        ------
        ValueError, TypeError
            As `gather`, and for a vector of another shape or of a dtype that does not convert
            (floating to integer, complex to real), before anything is written.
        """
        layout, tensors = self._lay_out(target, model, "target")
        layout.scatter_(tensors, vector)

    def add_(
        self,
        target: nn.Module | Mapping[str, Tensor],
        vector: Tensor,
        alpha: float = 1,
        *,
        model: nn.Module | None = None,
    ) -> None:
        """Add alpha * vector to the selected entries in place; others stay.

        Parameters, errors: as `scatter_`. The sum is formed in the wider of the vector's dtype and
        the target's, and rounded once.
        """
        layout, tensors = self._lay_out(target, model, "target")
        layout.add_(tensors, vector, alpha)

    def _lay_out(
        self, tensors: object, model: nn.Module | None, name: str
    ) -> tuple[Layout, Mapping[str, Tensor]]:
        if isinstance(tensors, nn.Module):
            if model is not None:
                raise TypeError(f"model is given with a mapping only; {name} is a model itself")
            layout = self.layout(tensors)
            return layout, layout.parameters
        if not isinstance(tensors, Mapping):
            raise TypeError(
                f"{name} must be a torch.nn.Module or a mapping of parameter names to tensors; got "
                f"an object of type {type(tensors).__name__}"
            )
        if model is None:
            raise TypeError(
                f"model must be given where {name} is a mapping: the module whose parameters it "
                "holds the tensors of"
            )
        layout = self.layout(model)
        if not layout.parameters.keys() <= tensors.keys():
            tensors = {own_name(str(key), layout.parameters): t for key, t in tensors.items()}
        return layout, tensors
