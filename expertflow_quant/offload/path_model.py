"""The network behind the path predictor: a small encoder-decoder over tokens, one head for all layers' experts.

After ExpertFlow (arXiv 2410.17954): the encoder reads the prompt, the decoder the tokens generated so far, and a
linear head gives layers x experts logits for each token before it runs. Here the head reads the encoder's states of
prompt tokens, too, since a prompt is known whole before it runs. Tokens of an image share one id: their kind and their
place in the image tell them apart, and ``features`` (a model's own input embeddings of them, projected) tell what they
show.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PathModelSizes:
    """``tokens`` ids and ``layers`` x ``experts`` of the model that is predicted; ``width`` d_model, ``inner`` d_ff;
    ``features`` numbers for each prompt token (0: none); ``places`` of an image that are told apart, further ones count
    as the last."""

    tokens: int
    layers: int
    experts: int
    width: int = 64
    inner: int = 256
    heads: int = 4
    encoder_layers: int = 3
    decoder_layers: int = 2
    places: int = 256
    features: int = 0


@dataclass(frozen=True)
class PathBatch:
    """Items side by side, padded: ``prompt`` and ``answer`` int64 [B, P] and [B, G] token ids, ``prompt_kind`` int64
    [B, P], ``place`` int64 [B, P] in the image, ``prompt_real`` and ``answer_real`` bool where no padding is;
    ``features`` float [B, P, F] or none."""

    prompt: Tensor
    prompt_kind: Tensor
    place: Tensor
    prompt_real: Tensor
    answer: Tensor
    answer_real: Tensor
    features: Tensor | None = None


class PathModel(nn.Module):
    """Logits of every token's experts from tokens alone, see the module's docstring."""

    def __init__(self, sizes: PathModelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.token = nn.Embedding(sizes.tokens, width)
        self.kind = nn.Embedding(3, width)
        self.place = nn.Embedding(sizes.places, width)
        self.feature = nn.Linear(sizes.features, width) if sizes.features else None
        encoder = nn.TransformerEncoderLayer(
            width, sizes.heads, sizes.inner, dropout=0.0, batch_first=True, norm_first=True
        )
        decoder = nn.TransformerDecoderLayer(
            width, sizes.heads, sizes.inner, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            encoder, sizes.encoder_layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(decoder, sizes.decoder_layers, nn.LayerNorm(width))
        self.head = nn.Linear(width, sizes.layers * sizes.experts)
        for table in (self.token, self.kind, self.place):
            nn.init.normal_(table.weight, std=0.5)

    def forward(self, batch: PathBatch) -> tuple[Tensor, Tensor]:
        """Logits float [B, P, L, E] of prompt tokens and [B, G, L, E] of generated ones."""
        memory = self.read(batch)
        return self.of_states(memory), self.of_answers(batch, memory)

    def read(self, batch: PathBatch) -> Tensor:
        """The encoder's states [B, P, width] of the prompts."""
        states: Tensor = self.encoder(self._prompt(batch), src_key_padding_mask=~batch.prompt_real)
        return states

    def of_states(self, states: Tensor) -> Tensor:
        """Logits [..., L, E] of states [..., width]."""
        return self.head(states).unflatten(-1, (self.sizes.layers, self.sizes.experts))

    def of_answers(self, batch: PathBatch, memory: Tensor) -> Tensor:
        """Logits [B, G, L, E] of the generated tokens, given what ``read`` made of the prompts."""
        if not batch.answer.shape[1]:
            return self.of_states(memory[:, :0])
        states = self._answer(batch)
        later = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool, device=states.device).triu(1)
        return self.of_states(self.decoder(states, memory, tgt_mask=later, memory_key_padding_mask=~batch.prompt_real))

    def _prompt(self, batch: PathBatch) -> Tensor:
        place = self.place(batch.place.clamp(max=self.sizes.places - 1)) * (batch.prompt_kind == 1).unsqueeze(-1)
        states = self.token(batch.prompt) + self.kind(batch.prompt_kind) + place
        states = states + waves(batch.prompt.shape[1], self.sizes.width).to(states)
        if self.feature is not None and batch.features is not None:
            states = states + self.feature(batch.features)
        return states

    def _answer(self, batch: PathBatch) -> Tensor:
        generated = torch.full_like(batch.answer, 2)
        states = self.token(batch.answer) + self.kind(generated)
        return states + waves(batch.answer.shape[1], self.sizes.width).to(states)


def waves(positions: int, width: int) -> Tensor:
    """float32 [positions, width]: sines and cosines of positions (Vaswani et al. 2017)."""
    speeds = torch.exp(torch.arange(0, width, 2) * (-9.2103404 / width))
    angles = torch.arange(positions).unsqueeze(1) * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
