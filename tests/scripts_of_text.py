"""Public training scripts of text, in small: see scripts.py."""

import math

import torch
import torch.nn.functional as F
from scripts import DRAWN
from torch import nn


class TinyGPT(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.query, self.head = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens, targets=None):
        h = self.norm(self.embedding(tokens))
        h = h + F.scaled_dot_product_attention(self.query(h), h, h, is_causal=True)
        logits = self.head(h)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


TOKENS = torch.randint(12, (64, 6), generator=DRAWN)


def language_model(place):
    """nanoGPT: gradients accumulate, the rate is set by hand, every few steps comes an evaluation and a checkpoint."""
    accumulation, evaluations, interval, most = 2, 2, 3, 0.02
    model = TinyGPT()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=most, betas=(0.9, 0.95))

    def rate(step):
        if step < 2:
            return most * (step + 1) / 3
        return most * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 2) / (evaluations * interval))))

    def set_rate(step):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)

    set_rate(0)
    best, losses = math.inf, []
    loader = place.batches(TOKENS[:, :-1], TOKENS[:, 1:])
    with place.session(model, optimizer, clip_norm=0.5, on_step=lambda record: set_rate(record.step + 1)) as session:
        for _ in range(evaluations):
            for number, (tokens, targets) in enumerate(session.batches(loader, steps=interval)):
                _, loss = model(tokens, targets)
                (loss / accumulation).backward()
                if (number + 1) % accumulation == 0:
                    session.step(loss)
            model.eval()
            with torch.no_grad():
                losses.append(float(model(TOKENS[:, :-1], TOKENS[:, 1:])[1]))
            model.train()
            if losses[-1] < best and place.is_root:
                best = losses[-1]
                torch.save({**session.state_dict(), "best": best}, place.folder / "ckpt.pt")
    if place.is_root:
        kept = torch.load(place.folder / "ckpt.pt")
        assert kept["version"] in (3, 6) and kept["best"] == best and kept["optimizer"]["state"]
    return {"losses": losses, **model.state_dict()}


class Trainer:
    """minGPT's: a class that owns the loop and calls back after each batch."""

    def __init__(self, model, loader, place, steps):
        self.model, self.loader, self.place, self.steps = model, loader, place, steps
        self.callbacks, self.seen = [], []

    def run(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        with self.place.session(self.model, self.optimizer, clip_norm=1.0) as self.session:
            for tokens in self.session.batches(self.loader, steps=self.steps):
                _, self.loss = self.model(tokens[0][:, :-1], tokens[0][:, 1:])
                self.loss.backward()
                self.session.step(self.loss)
                for callback in self.callbacks:
                    callback(self)


def trainer_with_callbacks(place):
    def evaluate(twin):
        with torch.no_grad():
            return float(twin(TOKENS[:, :-1], TOKENS[:, 1:])[1])

    def on_batch_end(trainer):
        value = trainer.session.evaluate(evaluate, every=2)
        if value is not None:
            trainer.seen.append(value)

    trainer = Trainer(TinyGPT(), place.loader(TOKENS), place, steps=6)
    trainer.callbacks.append(on_batch_end)
    trainer.run()
    assert len(trainer.seen) <= 3 and all(value < 12 for value in trainer.seen)
    return trainer.model.state_dict()


# -- sequences: a hidden state from batch to batch ---------------------------------------------------

STREAM = torch.randint(12, (31, 8), generator=DRAWN)  # eight columns of text


class Columns:
    """Pieces of a worker's columns, in the order of time."""

    def __init__(self, stream, session, length=5):
        own = slice(session.worker or 0, None, session.workers)  # the root's number is None, and it draws nothing
        self.stream, self.length = stream[:, own], length

    def __len__(self):
        return (len(self.stream) - 1) // self.length

    def __iter__(self):
        for at in range(0, len(self) * self.length, self.length):
            yield self.stream[at : at + self.length], self.stream[at + 1 : at + 1 + self.length]


class WordModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.lstm, self.head = nn.Embedding(12, 6), nn.LSTM(6, 8), nn.Linear(8, 12)
        self.double()

    def forward(self, words, hidden):
        out, hidden = self.lstm(self.embedding(words), hidden)
        return self.head(out).flatten(0, 1), hidden


def word_language_model(place):
    """The hidden state is carried on and detached, the mean gradient clipped, the rate annealed by validation."""
    model, rate, best, history = WordModel(), 2.0, math.inf, []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with place.session(model, optimizer, clip_norm=0.25) as session:
        batches = Columns(STREAM, session)
        for _ in range(4):
            hidden = None
            for words, targets in session.batches(batches, steps=len(batches)):
                hidden = hidden and tuple(each.detach() for each in hidden)
                out, hidden = model(words, hidden)
                loss = F.cross_entropy(out, targets.flatten())
                loss.backward()
                session.step(loss, samples=words.shape[1])
            model.eval()
            with torch.no_grad():
                value = float(F.cross_entropy(model(STREAM[:-1], None)[0], STREAM[1:].flatten()))
            model.train()
            if value > 0.99 * best:
                rate /= 4
                for group in optimizer.param_groups:
                    group["lr"] = rate
            best = min(best, value)
            history.append((value, rate))
    return {"history": history, **model.state_dict()}
