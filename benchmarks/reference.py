"""The yardstick of equivalence.py: OPT trained in plain PyTorch, without ColossalAI and without this project's code.

Written for reading. One device, fp32, transformers' own model and attention mask, torch's own AdamW; the loss of a
step is the sum of the negative log-likelihoods over the step's real targets, divided by their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import OPTForCausalLM

Row = Tensor  # (T,) int64 token ids
Step = list[Row]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides weights and data.

    Args:
        weight_decay: of matrices; biases and LayerNorm have none.
        num_warmup_steps: linear from 0 to `learning_rate`, which then falls linearly to 0 after the last step.
        max_grad_norm: 0: no clipping.
        micro_batch_size: rows that go through the model at once; decides which dropout masks are drawn.
        seed: of the dropout masks.
        dtype: of weights and arithmetic; float64 shows what rounding alone changes.
    """

    learning_rate: float
    weight_decay: float
    epsilon: float
    num_warmup_steps: int
    max_grad_norm: float
    dropout: float
    micro_batch_size: int
    seed: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Trained:
    """What is compared: nats a token, norms before clipping, and one evaluation after each epoch."""

    losses: list[float]
    grad_norms: list[float]
    evaluations: list[float]


def train(weights: Path, epochs: list[list[Step]], held_out: list[Row], recipe: Recipe, final: Path) -> Trained:
    """Train the model of the folder `weights`, and write it to the folder `final`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, recipe.dtype)
    model = OPTForCausalLM.from_pretrained(weights, dtype=dtype, dropout=recipe.dropout).to(device).train()
    optimizer = make_optimizer(model, recipe)
    num_steps, warmup = sum(len(epoch) for epoch in epochs), recipe.num_warmup_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / warmup, (num_steps - step) / (num_steps - warmup))
    )
    trained = Trained([], [], [])
    torch.manual_seed(recipe.seed)
    for epoch in epochs:
        for rows in epoch:
            trained.losses.append(add_gradients(model, rows, recipe.micro_batch_size))
            trained.grad_norms.append(clip(model, recipe.max_grad_norm))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        trained.evaluations.append(evaluate(model, held_out))
    model.save_pretrained(final)
    return trained


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, eps=recipe.epsilon)


def add_gradients(model: nn.Module, rows: Step, micro_batch_size: int) -> float:
    """Run the step's rows forward and backward, and return their loss: the mean over all their targets."""
    num_targets = sum(len(row) - 1 for row in rows)
    total = 0.0
    for first in range(0, len(rows), micro_batch_size):
        loss = summed_loss(model, rows[first : first + micro_batch_size]) / num_targets
        loss.backward()
        total += loss.item()
    return total


def summed_loss(model: nn.Module, rows: Step) -> Tensor:
    """Return the negative log-likelihood in nats, summed over every token but the first of each row."""
    device = next(model.parameters()).device
    input_ids = pad_sequence(rows, batch_first=True, padding_value=1).to(device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    logits = model(input_ids=input_ids, attention_mask=mask).logits
    targets = input_ids.masked_fill(mask == 0, -100)[:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")


def clip(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to `max_norm`, and return their norm before; summed in fp64, exact enough for any size."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    if max_norm and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


@torch.no_grad()
def evaluate(model: nn.Module, held_out: list[Row]) -> float:
    """Return the mean negative log-likelihood over the targets of all rows, taken one by one: nothing is padded."""
    model.eval()
    losses = [summed_loss(model, [row]).item() for row in held_out]
    model.train()
    return sum(losses) / sum(len(row) - 1 for row in held_out)
