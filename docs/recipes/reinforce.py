"""Learn by REINFORCE to leave a small world, each worker in a world of its own: mpisync run -n 3 reinforce.py."""

import itertools

import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import one_hot

import mpisync

SIDE, LONGEST, EPISODES, STEPS = 4, 30, 8, 300
MOVES = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])


class World:
    """A square of fields: each move costs 1 until the last corner is reached."""

    def __init__(self, number: int) -> None:
        self.random = torch.Generator().manual_seed(number)

    def begin(self) -> Tensor:
        """Return a field to begin at."""
        self.at = torch.randint(SIDE - 1, (2,), generator=self.random)
        return self.at

    def move(self, action: int) -> tuple[Tensor, float, bool]:
        """Return the next field, what the move gives, and whether the corner is reached."""
        self.at = (self.at + MOVES[action]).clamp(0, SIDE - 1)
        return self.at, -1.0, bool((self.at == SIDE - 1).all())


def play(world: World, policy: nn.Module) -> tuple[Tensor, Tensor]:
    """Return an episode's logarithms of chances, and what came after each of its moves."""
    at, done, logs, rewards = world.begin(), False, [], []
    while not done and len(rewards) < LONGEST:
        chances = Categorical(logits=policy(one_hot(at, SIDE).flatten().float()))
        action = chances.sample()  # random numbers in the loop are each worker's own
        logs.append(chances.log_prob(action))
        at, reward, done = world.move(int(action))
        rewards.append(reward)
    return torch.stack(logs), torch.tensor(rewards).flip(0).cumsum(0).flip(0)


torch.manual_seed(0)
policy = nn.Sequential(nn.Linear(2 * SIDE, 32), nn.Tanh(), nn.Linear(32, 4))
optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)

with mpisync.Session(MPI.COMM_WORLD, policy, optimizer, progress=False) as session:
    world, running = World(session.worker or 0), -float(LONGEST)  # the root has no number, and plays not
    for _ in session.batches(itertools.count(), steps=STEPS):  # no loader: a step is EPISODES episodes
        episodes = [play(world, policy) for _ in range(EPISODES)]
        returns = torch.cat([returns for _, returns in episodes])
        weights = (returns - returns.mean()) / (returns.std() + 1e-6)
        loss = -(torch.cat([logs for logs, _ in episodes]) * weights).sum() / EPISODES
        loss.backward()
        session.step(loss, samples=EPISODES)
        running += 0.1 * (sum(float(returns[0]) for _, returns in episodes) / EPISODES - running)
        if running > -5.0:
            session.stop()  # on all ranks: this worker's games are won

if MPI.COMM_WORLD.rank == 0:
    with torch.no_grad():
        mean = sum(len(play(world, policy)[1]) for _ in range(100)) / 100
    print(f"after {session.version} updates: {mean:.1f} moves an episode")
