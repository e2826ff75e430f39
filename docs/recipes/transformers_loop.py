"""Train a small BERT of Hugging Face transformers by a loop of one's own: mpisync run -n 3 transformers_loop.py."""

import torch
from mpi4py import MPI
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import mpisync

BATCH, STEPS = 16, 80

torch.manual_seed(0)
tokens = torch.randint(0, 32, (256, 8))
labels = (tokens[:, 0] < 16).long()
data = [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)]

config = BertConfig(
    vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
model = BertForSequenceClassification(config)  # or .from_pretrained("bert-base-uncased"), on every rank
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=STEPS)
loader = DataLoader(data, batch_size=BATCH, shuffle=True)

model.train()  # from_pretrained leaves a model in eval()
with mpisync.Session(
    MPI.COMM_WORLD,
    model,
    optimizer,
    scheduler=scheduler,
    clip_norm=1.0,
    policy=mpisync.BackupWorkers(0),
    progress=False,
) as session:
    for batch in session.batches(loader, steps=STEPS):
        loss = model(**batch).loss
        loss.backward()
        session.step(loss)

if session.worker is None or session.workers == 1:  # the root, or who trains alone
    model.eval()
    with torch.no_grad():
        right = (model(input_ids=tokens).logits.argmax(1) == labels).float().mean()
    print(f"version {session.version}, accuracy {right:.2f}")
