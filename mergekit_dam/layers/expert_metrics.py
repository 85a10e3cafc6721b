"""Sensitivity of each domain's loss to the outputs of single experts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_dam.fitting.metric import Metric
from mergekit_dam.model.experts import Routing, run_expert
from mergekit_dam.streams.distributed import all_sums


@dataclass(frozen=True)
class ExpertGradients:
    """Gradients of one domain's loss at the summed output of a block's experts.

    Attributes:
        routing: routing of the tokens whose gradients are taken, at some coefficients.
        gradients: gradients at the summed output of all experts, `[tokens, hidden]`.
        expert: returns the weights of one expert at these coefficients, by parameter, fp32.
    """

    routing: Routing
    gradients: Tensor
    expert: Callable[[int], Mapping[str, Tensor]]

    def metrics(self, module: nn.Module, expert: int) -> dict[str, Metric]:
        """The metrics of one expert's linears, by parameter.

        They are computed from the tokens that are routed to it, or from all tokens if there are
        none. The routing weights are left out: the tokens of the fit carry their own.

        Args:
            module: the module that owns all experts.
            expert: index of the expert.
        """
        rows = (self.routing.experts == expert).any(1).nonzero()[:, 0]
        if not all_sums([len(rows)])[0]:  # no token in any process
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
