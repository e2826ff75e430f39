"""Public training scripts in small, each in its original's order of things, with a session's four lines in it.

A script is given a `Place`: in a session it is one of several workers, or alone; in plain torch it is one process,
whose batches are those of all workers together. What it returns must be the same either way.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

DRAWN = torch.Generator().manual_seed(3)
X, Y = torch.randn(48, 6, generator=DRAWN).double(), torch.randint(3, (48,), generator=DRAWN)
HELD_OUT = torch.randn(30, 6, generator=DRAWN).double(), torch.randint(3, (30,), generator=DRAWN)
BATCH = 4  # samples of a worker


class Place(NamedTuple):
    """Where a script runs: what it starts a session with, and how many workers' batches each of its batches holds."""

    session: Callable[..., Any]
    comm: MPI.Intracomm
    parts: int = 1
    backups: int = 0
    folder: Any = None

    @property
    def is_root(self) -> bool:
        return self.comm.rank == self.comm.size - 1

    def batches(self, *data):
        """The data as a list of batches, which a session shares out among its workers."""
        return list(zip(*(each.split(BATCH * self.parts) for each in data), strict=True))

    def loader(self, *data):
        return DataLoader(TensorDataset(*data), batch_size=BATCH * self.parts)

    def split(self, *batch):
        """A batch as the workers have it, for losses that are of a whole batch."""
        return list(zip(*(each.chunk(self.parts) for each in batch), strict=True))


def mlp(*widths):
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def classifier():
    torch.manual_seed(0)
    return mlp(6, 8, 3)


@torch.no_grad()
def validate(model, criterion=F.cross_entropy):
    model.eval()
    x, y = HELD_OUT
    loss = float(criterion(model(x), y))
    model.train()
    return loss


# -- images: epochs ----------------------------------------------------------------------------------


class Meter:
    def __init__(self):
        self.sum = self.count = 0

    def update(self, value, n):
        self.sum, self.count = self.sum + value * n, self.count + n


def epochs_with_best_accuracy(place):
    """torch's imagenet example: train() and validate() by turns, StepLR, the best accuracy, a file."""
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    criterion = nn.CrossEntropyLoss()
    loader = place.loader(X, Y)

    def train(session):
        model.train()
        losses = Meter()
        for images, target in session.batches(loader, steps=len(loader) // session.workers):
            output = model(images)
            loss = criterion(output, target)
            losses.update(loss.item(), images.size(0))
            loss.backward()
            session.step(loss)
        return losses

    def accuracy():
        model.eval()
        with torch.no_grad():
            return float((model(HELD_OUT[0]).argmax(1) == HELD_OUT[1]).float().mean())

    best, history = 0.0, []
    with place.session(model, optimizer) as session:
        for epoch in range(3):
            train(session)
            found = accuracy()
            scheduler.step()
            is_best, best = found > best, max(found, best)
            if place.is_root and is_best:
                state = {"epoch": epoch + 1, "best": best, "scheduler": scheduler.state_dict(), **session.state_dict()}
                torch.save(state, place.folder / "model_best.pt")
            history.append((found, scheduler.get_last_lr()[0]))
    if place.is_root:
        assert torch.load(place.folder / "model_best.pt")["best"] == best
    return {"history": history, **model.state_dict()}


# -- generative models -------------------------------------------------------------------------------

NOISE = torch.randn(48, 2, generator=DRAWN).double()  # comes with the data, so that one process has the same


def gan(place):
    """dcgan: the discriminator on real and fake, the generator through it, an optimizer each, in one step."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": mlp(2, 8, 6), "discriminator": mlp(6, 8, 1)})
    generator, discriminator = model["generator"], model["discriminator"]
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.02, betas=(0.5, 0.999)) for part in model.values()]
    criterion = nn.BCEWithLogitsLoss()
    with place.session(model, optimizers) as session:
        for real, noise in session.batches(place.loader(X, NOISE), steps=6):
            ones = torch.ones(len(real), 1).double()
            fake = generator(noise)
            judged = criterion(discriminator(real), ones) + criterion(discriminator(fake.detach()), 0 * ones)
            judged.backward()
            discriminator.requires_grad_(False)
            made = criterion(discriminator(fake), ones)
            made.backward()
            discriminator.requires_grad_(True)
            session.step(judged + made)
    return model.state_dict()


def sum_of_losses(place):
    """The vae example: reconstruction and divergence are sums over the batch, so they are multiplied by N."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": mlp(6, 8, 4), "decoder": mlp(2, 8, 6)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)  # Adam would hide the factor
    with place.session(model, optimizer) as session:
        counted = session.workers - place.backups
        for x, noise in session.batches(place.loader(X.sigmoid(), NOISE), steps=6):
            mean, log_variance = model["encoder"](x).chunk(2, 1)
            made = model["decoder"](mean + noise * (0.5 * log_variance).exp())
            bce = F.binary_cross_entropy_with_logits(made, x, reduction="sum")
            kld = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
            loss = bce + kld
            (loss * counted).backward()
            session.step(loss / len(x))
    return model.state_dict()


# -- no loader ---------------------------------------------------------------------------------------


class Corridor:
    """Five places in a row; the last one gives 1, and each step to it costs a tenth."""

    def __init__(self, number):
        self.drawn = torch.Generator().manual_seed(number)

    def episode(self, policy):
        at, chances, rewards = 0, [], []
        while at < 4 and len(rewards) < 12:
            logits = policy(F.one_hot(torch.tensor(at), 5).double())
            action = int(torch.multinomial(logits.detach().softmax(0), 1, generator=self.drawn))
            chances.append(logits.log_softmax(0)[action])
            at = max(0, at + (1 if action else -1))
            rewards.append(1.0 if at == 4 else -0.1)
        returns = torch.tensor(rewards).double().flip(0).cumsum(0).flip(0)
        return -(torch.stack(chances) * returns).sum(), sum(rewards)


def reinforce(place):
    """torch's reinforce example: each worker plays in an environment of its own."""
    torch.manual_seed(0)
    policy = mlp(5, 8, 2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    with place.session(policy, optimizer) as session:
        corridors = [Corridor(part + (session.worker or 0)) for part in range(place.parts)]
        running = 0.0
        for _ in session.batches(itertools.count(), steps=8):
            played = [corridor.episode(policy) for corridor in corridors]
            loss = sum(loss for loss, _ in played) / len(played)
            running = 0.95 * running + 0.05 * played[0][1]
            loss.backward()
            session.step(loss, samples=len(played))
    return policy.state_dict()


class Kernel(nn.Module):
    """The marginal likelihood of a Gaussian process, which is of all points at once."""

    def __init__(self):
        super().__init__()
        self.log_scale, self.log_noise = nn.Parameter(torch.zeros(6).double()), nn.Parameter(torch.zeros(1).double())

    def forward(self, x, y):
        scaled = x / self.log_scale.exp()
        covariance = (-0.5 * (scaled[:, None] - scaled[None]).pow(2).sum(-1)).exp()
        covariance = covariance + self.log_noise.exp() * torch.eye(len(x)).double()
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(x)).double(), covariance)
        return -normal.log_prob(y) / len(x)


def exact_full_batch(place):
    """gpytorch's regression: a loss of all data, the same on all workers, of whom the first is enough."""
    model = Kernel()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with place.session(model, optimizer) as session:
        for x, y in session.batches(itertools.repeat((X[:16], X[:16].sin().sum(1))), steps=5):
            loss = model(x, y)
            loss.backward()
            session.step(loss)
    return model.state_dict()


# -- models in parts ---------------------------------------------------------------------------------


def fine_tuned(place):
    """A frozen body, a new head, and two groups with rates of their own, under a schedule."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"stem": mlp(6, 8), "body": mlp(8, 8), "head": mlp(8, 3)})
    for parameter in model["stem"].parameters():
        parameter.requires_grad = False
    groups = [{"params": model["body"].parameters(), "lr": 0.01}, {"params": model["head"].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.2], total_steps=8)
    with place.session(model, optimizer, scheduler=scheduler) as session:
        for x, y in session.batches(place.loader(X, Y), steps=8):
            loss = F.cross_entropy(model["head"](model["body"](model["stem"](x)).tanh()), y)
            loss.backward()
            session.step(loss)
    return model.state_dict()


def criterion_with_parameters(place):
    """A centre for each class is learned too, by an optimizer of its own; the loss is a sum of two."""
    torch.manual_seed(0)
    net, head, centres = mlp(6, 4), mlp(4, 3), nn.ParameterList([torch.randn(3, 4).double()])
    model = nn.ModuleDict({"net": net, "head": head, "criterion": centres})
    both = [*net.parameters(), *head.parameters()]
    optimizers = [torch.optim.Adam(both, lr=0.02), torch.optim.SGD(centres.parameters(), lr=0.5)]
    with place.session(model, optimizers) as session:
        for x, y in session.batches(place.loader(X, Y), steps=6):
            features = net(x)
            loss = F.cross_entropy(head(features), y) + 0.1 * (features - centres[0][y]).pow(2).sum(1).mean()
            loss.backward()
            session.step(loss)
    return model.state_dict()


# -- batches of another kind -------------------------------------------------------------------------


class Graphs(SimpleNamespace):
    """Graphs side by side: nodes, edges, and which graph a node is of."""

    num_graphs: int

    @classmethod
    def of(cls, nodes, y):
        count, size = nodes.shape[:2]
        ring = torch.arange(size)
        edges = torch.stack([ring, ring.roll(1)])
        return cls(
            x=nodes.flatten(0, 1), y=y, num_graphs=count, batch=torch.arange(count).repeat_interleave(size),
            edges=torch.cat([edges + number * size for number in range(count)], 1),
        )  # fmt: skip


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = mlp(2, 8), mlp(8, 3)

    def forward(self, graphs):
        h = self.first(graphs.x)
        to, of = graphs.edges
        h = (h + torch.zeros_like(h).index_add(0, to, h[of])).tanh()
        return self.last(torch.zeros(graphs.num_graphs, 8).double().index_add(0, graphs.batch, h))


def graphs(place):
    """As torch_geometric's examples: a batch is one object, which says of how many graphs it is."""
    model = GraphNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loader = DataLoader(
        TensorDataset(X.view(48, 3, 2), Y), batch_size=BATCH * place.parts,
        collate_fn=lambda pairs: Graphs.of(torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])),
    )  # fmt: skip
    with place.session(model, optimizer, weight="samples") as session:
        for data in session.batches(loader, steps=6):
            loss = F.cross_entropy(model(data), data.y)
            loss.backward()
            session.step(loss)
    return model.state_dict()


def contrastive(place):
    """Two views of each sample; what is pushed apart is what a worker has in its own batch."""
    torch.manual_seed(0)
    model = mlp(6, 8, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with place.session(model, optimizer) as session:
        for batch in session.batches(place.batches(X, X + 0.1 * X.cos()), steps=6):
            total = 0.0
            for one, other in place.split(*batch):
                a, b = F.normalize(model(one)), F.normalize(model(other))
                total = total + F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a))) / place.parts
            total.backward()
            session.step(total)
    return model.state_dict()


def mixed_precision(place):
    """autocast, in bfloat16: no scaler, and weights in float32."""
    model = classifier().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with place.session(model, optimizer) as session:
        for batch in session.batches(place.batches(X.float(), Y), steps=6):
            for x, y in place.split(*batch):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    out = model(x)
                    loss = F.cross_entropy(out, y)
                assert out.dtype is torch.bfloat16
                (loss / place.parts).backward()
            session.step(loss)
    return model.state_dict()


# -- code that is arranged in another way ------------------------------------------------------------


class Net:
    """skorch's face: fit begins anew, partial_fit goes on; each has a session, one after the other."""

    def __init__(self, place):
        self.place = place

    def fit(self, *data):
        self.module = classifier()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        return self.partial_fit(*data)

    def partial_fit(self, *data):
        loader = self.place.loader(*data)
        with self.place.session(self.module, self.optimizer) as session:
            for x, y in session.batches(loader, steps=len(loader) // session.workers):
                loss = F.cross_entropy(self.module(x), y)
                loss.backward()
                session.step(loss)
        return self

    def score(self):
        return validate(self.module)


def fit_and_partial_fit(place):
    net = Net(place).fit(X, Y)
    scores = [net.score(), net.partial_fit(X, Y).score()]  # with the momentum of the first
    return {"scores": scores, **net.module.state_dict()}


def train_one_epoch(model, optimizer, batches, session):
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        session.step(loss)


def all_in_functions(place):
    """Functions that know neither the loader nor the policy; `zero_grad` is left where it was."""
    model, history = classifier(), []
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    loader = place.batches(X, Y)
    with place.session(model, optimizer) as session:
        for _ in range(3):
            train_one_epoch(model, optimizer, session.batches(loader, steps=3), session)
            history.append(validate(model))
            scheduler.step()
    return {"history": history, **model.state_dict()}
