"""Train a small DCGAN, its generator and discriminator in one session: mpisync run -n 3 gan.py."""

import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import mpisync

LATENT, STEPS = 8, 150


def images(count: int) -> Tensor:
    """Return images of 8x8 pixels, on each of which one half, left or right, is bright."""
    pictures = torch.full((count, 1, 8, 8), -0.8)
    left = torch.rand(count) < 0.5
    pictures[left, :, :, :4] = 0.8
    pictures[~left, :, :, 4:] = 0.8
    return pictures + 0.1 * torch.randn_like(pictures)


torch.manual_seed(0)
model = nn.ModuleDict(
    {
        "generator": nn.Sequential(
            nn.ConvTranspose2d(LATENT, 16, 4), nn.BatchNorm2d(16), nn.ReLU(),  # 4x4
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Tanh(),  # 8x8
        ),
        "discriminator": nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.LeakyReLU(0.2),  # 4x4
            nn.Conv2d(16, 1, 4), nn.Flatten(0),  # one number an image
        ),
    }
)  # fmt: skip
generator, discriminator = model["generator"], model["discriminator"]
optimizers = [
    torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
    torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
]
data = images(512)
loader = DataLoader(TensorDataset(data), batch_size=32, shuffle=True)

with mpisync.Session(MPI.COMM_WORLD, model, optimizers, ema=0.95, progress=False) as session:
    for (real,) in session.batches(loader, steps=STEPS):
        fake = generator(torch.randn(len(real), LATENT, 1, 1))

        # The discriminator's loss reaches its own part alone: the images are cut off from what made them.
        judged = softplus(-discriminator(real)).mean() + softplus(discriminator(fake.detach())).mean()
        judged.backward()

        # The generator's goes through the discriminator, and must leave no gradient there.
        discriminator.requires_grad_(False)
        made = softplus(-discriminator(fake)).mean()
        made.backward()
        discriminator.requires_grad_(True)

        session.step(judged + made)  # both parts are updated, each by its own optimizer

if session.worker == 0:
    sampler = session.snapshot(average=True)["generator"].eval()
    with torch.no_grad():
        fakes = sampler(torch.randn(512, LATENT, 1, 1))
    for name, pictures in (("real", data), ("generated", fakes)):
        sides = pictures.unflatten(3, (2, 4)).mean((1, 2, 4))  # of each image, its left and right half
        bright, dark = sides.max(1).values.mean(), sides.min(1).values.mean()
        left = (sides[:, 0] > sides[:, 1]).float().mean()
        print(f"{name}: bright half {bright:.2f}, dark half {dark:.2f}, {left:.0%} bright on the left")
