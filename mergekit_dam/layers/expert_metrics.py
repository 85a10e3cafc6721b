"""How much each domain's loss feels what single experts put out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_dam.fitting.metric import Metric
from mergekit_dam.model.experts import Routing, run_expert
from mergekit_dam.streams.distributed import all_sums


@dataclass(frozen=True)
class ExpertGradients:
    """Gradients of one domain's loss where the experts of a block are added up.

    Attributes:
        routing: of the tokens that gradients are taken of, at some coefficients.
        gradients: at what leaves all experts together, `[tokens, hidden]`.
        expert: weights of one expert at these coefficients, by parameter, fp32.
    """

    routing: Routing
    gradients: Tensor
    expert: Callable[[int], Mapping[str, Tensor]]

    def metrics(self, module: nn.Module, expert: int) -> dict[str, Metric]:
        """The metrics of one expert's linears, by parameter.

        Of the tokens that are sent to it; of all, should there be none. With what weight an
        expert counts for a token is left out: the tokens of the fit have their own.

        Args:
            module: of all experts.
        """
        rows = (self.routing.experts == expert).any(1).nonzero()[:, 0]
        if not all_sums([len(rows)])[0]:
            rows = torch.arange(len(self.gradients), device=self.gradients.device)
        with torch.enable_grad():
            x = self.routing.hidden[rows].requires_grad_(True)
            output, products = run_expert(module, self.expert(expert), x)
        leaving = [product.output for product in products.values()]
        found = torch.autograd.grad(output, leaving, self.gradients[rows])
        return {
            name: Metric.of_gradients(gradient)
            for name, gradient in zip(products, found, strict=True)
        }
