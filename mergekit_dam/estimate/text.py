"""The size of the calibration text: how many of its tokens each step of a merge uses."""

from dataclasses import dataclass

from mergekit_dam.layers.judged_tokens import stride
from mergekit_dam.search.sensitivity import TOKENS, gradient_sequences
from mergekit_dam.streams.share import Share, judging_split
from mergekit_dam.streams.stream import chunks


@dataclass(frozen=True)
class Text:
    """The calibration text of the models that have some.

    Attributes:
        sequences: number of sequences of each model.
        held_out: how many of them are held out, for each model; they are the last ones.
        length: tokens per sequence.
    """

    sequences: tuple[int, ...]
    held_out: tuple[int, ...]
    length: int

    @property
    def models(self) -> int:
        """Number of models with text."""
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """Tokens of all models."""
        return self.length * sum(self.sequences)

    @property
    def held_out_tokens(self) -> int:
        """Held-out tokens of all models."""
        return self.length * sum(self.held_out)

    @property
    def fit_tokens(self) -> int:
        """Tokens of all models that take part in the fit."""
        return self.tokens - self.held_out_tokens

    @property
    def fit_sequences(self) -> int:
        """Sequences that take part in the fit, of the model that has the most."""
        return max(self._fit)

    @property
    def judging_tokens(self) -> int:
        """Tokens of all models on which the merged model as a whole is judged."""
        return self.held_out_tokens if self.judged_apart else self.fit_tokens

    @property
    def judged_apart(self) -> bool:
        """Whether the tokens that judge take no part in the fit."""
        return judging_split(self._shares()) == "held_out"

    @property
    def tensor_judging_tokens(self) -> int:
        """Held-out tokens of all models that judge single tensors, but for those of experts."""
        return sum(n * self.length // stride(n * self.length) for n in self.held_out)

    @property
    def gradient_tokens(self) -> int:
        """Tokens of all models whose gradients make up metrics."""
        return self.first_tokens(TOKENS)

    @property
    def gradient_tokens_each(self) -> int:
        """The same of one model, on average."""
        return self.gradient_tokens // max(1, self.models)

    def first_tokens(self, limit: int) -> int:
        """Tokens of all models in the first sequences of the fit, about `limit` per model."""
        sequences = (gradient_sequences(n, self.length, tokens=limit) for n in self._fit)
        return self.length * sum(sequences)

    def batch_tokens(self, size: int) -> int:
        """Tokens of all models in a batch of `size` sequences per model."""
        return self.length * sum(min(size, n) for n in self._fit)

    @property
    def fit_chunks(self) -> int:
        """Number of chunks that the sequences of the fit run in."""
        return sum(len(list(chunks(0, count, self.length))) for count in self._fit)

    @property
    def _fit(self) -> list[int]:
        """Sequences of each model that take part in the fit."""
        return [share.count("fit") for share in self._shares()]

    def _shares(self) -> list[Share]:
        pairs = zip(self.sequences, self.held_out, strict=True)
        return [Share.of_all(count, held_out) for count, held_out in pairs]
