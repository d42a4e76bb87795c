"""The character model, its initial weights, and text sampled from it.

Shapes: B streams, T characters, V characters in the vocabulary, H hidden units, L layers.
"""

from __future__ import annotations

import torch
from lstm_triton_kernels.spec import LSTMSpec
from torch import Tensor, nn

from lstm_triton import LSTM

State = tuple[Tensor, Tensor]
"""h and c, (L, B, H) each."""


class CharacterModel(nn.Module):
    """Embedding, LSTM, linear decoder: from characters to the logits of the next ones."""

    def __init__(self, vocabulary_size: int, lstm: nn.LSTM | LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, lstm.input_size)
        self.lstm = lstm
        self.decoder = nn.Linear(lstm.hidden_size, vocabulary_size)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, T) and the state (zero if None) -> logits (B, T, V) and the next state."""
        output, state = self.lstm(self.embedding(tokens), state)
        return self.decoder(output), state


def build_baseline(vocabulary_size: int, embedding: int, hidden: int, layers: int, seed: int) -> CharacterModel:
    """The model with `torch.nn.LSTM`; the seed decides its weights."""
    torch.manual_seed(seed)
    return CharacterModel(vocabulary_size, nn.LSTM(embedding, hidden, layers, batch_first=True))


def build_variant(baseline: CharacterModel, spec: LSTMSpec, seed: int) -> CharacterModel:
    """A model of the same sizes with this library's LSTM, and with all of the baseline's weights that the variant has.

    A coupled variant has no input gate, so it takes the blocks f, g and o; peephole weights are drawn from the seed.
    """
    torch.manual_seed(seed)
    lstm = LSTM(
        baseline.lstm.input_size,
        baseline.lstm.hidden_size,
        baseline.lstm.num_layers,
        batch_first=True,
        coupled=spec.coupled,
        peephole=spec.peephole,
        output_peephole=spec.output_peephole,
    )
    model = CharacterModel(baseline.embedding.num_embeddings, lstm)
    model.embedding.load_state_dict(baseline.embedding.state_dict())
    model.decoder.load_state_dict(baseline.decoder.state_dict())
    shared = {
        name: torch.cat([LSTMSpec().split_gates(weight, dim=0)[gate] for gate in spec.gates])
        for name, weight in baseline.lstm.state_dict().items()
    }
    lstm.load_state_dict(lstm.state_dict() | shared)
    return model


@torch.no_grad()
def sample(model: CharacterModel, vocabulary: str, prompt: Tensor, length: int, temperature: float, seed: int) -> str:
    """`length` characters that the model writes after the prompt (T,), each drawn from softmax(logits / temperature).

    The draws are made on the CPU, so that a seed gives the same draws on every device.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens, state, written = prompt[None], None, []
    for _ in range(length):
        logits, state = model(tokens, state)
        probabilities = torch.softmax(logits[0, -1].double().cpu() / temperature, dim=0)
        token = torch.multinomial(probabilities, 1, generator=generator)
        written.append(vocabulary[int(token)])
        tokens = token[None].to(prompt.device)
    return "".join(written)
