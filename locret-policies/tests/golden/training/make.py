"""Golden training steps of retaining heads (arXiv 2410.01805, section 3.2), in PyTorch on the CPU.

    python3 make.py

Packages: torch 2.15.0, transformers 5.23.0 (for the schedule alone), safetensors 0.8.0, numpy 2.4.6.
A few seconds.

Two layers' heads, each score = fc2(silu(fc1(x))) without biases: in 24, d_R 16, 2 KV heads, 32 rows
(consecutive tokens) of inputs x and labels y a layer. S_l is SmoothL1 (beta 1) averaged over a
layer's rows and KV heads; M_l is the mean over KV heads and i of (score[i] - score[i+1])^2.
  joint         loss = mean_l S_l + alpha * sum_l M_l, alpha 0.0025: the authors' objective
  joint_strong  the same with alpha 0.25, where the smoothing term weighs visibly
  layerwise     every layer on its own: loss_l = S_l + alpha * layers * M_l, alpha 0.0025
Five steps on the same rows: gradients clipped by value to +-0.5, then AdamW (lr 5e-4, betas 0.9 and
0.95, eps 1e-8, decoupled weight decay 0.01), constant rate. A second, hand-written f64 computation
checks every number.

golden.json:
  hyper-parameters; cases {name: {alpha, losses: the loss before each of the five steps and after the
  last: [6] for the joint cases, [layers][6] for layerwise, clipped: how many of how many gradient
  entries the clip changed at the first step}};
  schedule: {lr, warmup, total, at: [[n, rate]]}: the rate that the n-th optimiser step (from 0) has
golden.safetensors, F32: inputs [2, 32, 24], labels [2, 32, 2]; initial.fc1 [2, 16, 24], initial.fc2
  [2, 2, 16]; NAME.step1.fc1, NAME.step1.fc2, NAME.step5.fc1, NAME.step5.fc2 for every case;
  initial.scores [2, 32, 2]; NAME.grad.fc1, NAME.grad.fc2: the first step's gradients before the clip
"""

import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import get_linear_schedule_with_warmup

HERE = pathlib.Path(__file__).parent
LAYERS, ROWS, IN, D_R, KV_HEADS, STEPS = 2, 32, 24, 16, 2, 5
LR, BETAS, EPS, DECAY, CLIP, ALPHA = 5e-4, (0.9, 0.95), 1e-8, 0.01, 0.5, 0.0025


def f32(x):
    return float(str(np.float32(x)))


def data():
    g = torch.Generator().manual_seed(20241001)
    x = torch.randn(LAYERS, ROWS, IN, generator=g) * 2
    y = torch.randn(LAYERS, ROWS, KV_HEADS, generator=g) * 3 + torch.tensor([4.0, -1.0])
    fc1 = torch.randn(LAYERS, D_R, IN, generator=g) * 0.4
    fc2 = torch.randn(LAYERS, KV_HEADS, D_R, generator=g) * 0.4
    return x, y, fc1, fc2


def score(fc1, fc2, x):
    return torch.nn.functional.silu(x @ fc1.transpose(-1, -2)) @ fc2.transpose(-1, -2)


def parts(fc1, fc2, x, y):
    """Per layer: SmoothL1 and smoothing terms [layers]."""
    s = score(fc1, fc2, x)
    fit = nn.SmoothL1Loss(reduction="none")(s, y).mean((1, 2))
    return fit, ((s[:, :-1] - s[:, 1:]) ** 2).mean((1, 2))


def loss_of(fit, smooth, alpha, layerwise):
    # The layers share nothing, so the sum of the layerwise losses trains each on its own.
    return fit + alpha * LAYERS * smooth if layerwise else fit.mean() + alpha * smooth.sum()


def train(x, y, fc1, fc2, alpha, layerwise):
    p = [nn.Parameter(fc1.clone()), nn.Parameter(fc2.clone())]
    optimiser = torch.optim.AdamW(p, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    losses, out = [], {}
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        loss = loss_of(*parts(*p, x, y), alpha, layerwise)
        losses.append(loss.detach())
        loss.sum().backward()
        if step == 1:
            out["grad.fc1"], out["grad.fc2"] = (q.grad.clone() for q in p)
        nn.utils.clip_grad_value_(p, CLIP)
        optimiser.step()
        if step in (1, STEPS):
            out[f"step{step}.fc1"], out[f"step{step}.fc2"] = (q.detach().clone() for q in p)
    losses.append(loss_of(*parts(*p, x, y), alpha, layerwise).detach())
    return torch.stack(losses), out


def by_hand(x, y, fc1, fc2, alpha, layerwise):
    """The same five steps without autograd and without torch's optimiser, in f64."""
    x, y, w1, w2 = (t.double().numpy() for t in (x, y, fc1, fc2))
    w, m, v = [w1.copy(), w2.copy()], [0, 0], [0, 0]
    for step in range(1, STEPS + 1):
        h = x @ w[0].swapaxes(1, 2)
        sig = 1 / (1 + np.exp(-h))
        a = h * sig
        s = a @ w[1].swapaxes(1, 2)
        ds = np.clip(s - y, -1, 1) / (ROWS * KV_HEADS)
        jump = 2 * (s[:, :-1] - s[:, 1:]) / ((ROWS - 1) * KV_HEADS)
        dm = np.zeros_like(s)
        dm[:, :-1] += jump
        dm[:, 1:] -= jump
        ds = ds + alpha * LAYERS * dm if layerwise else ds / LAYERS + alpha * dm
        g2 = ds.swapaxes(1, 2) @ a
        dh = (ds @ w[1]) * (sig * (1 + h * (1 - sig)))
        g1 = dh.swapaxes(1, 2) @ x
        for i, g in enumerate((g1, g2)):
            g = np.clip(g, -CLIP, CLIP)
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            w[i] *= 1 - LR * DECAY
            w[i] -= LR * (m[i] / (1 - BETAS[0] ** step)) / (np.sqrt(v[i] / (1 - BETAS[1] ** step)) + EPS)
    return w


def schedule():
    q = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([q], lr=LR)
    warmup, total = 2000, 3000
    s = get_linear_schedule_with_warmup(optimiser, num_warmup_steps=warmup, num_training_steps=total)
    wanted, at = {0, 1, 2, 10, 500, 1999, 2000, 2001, 2500, 2999}, []
    for n in range(total):
        if n in wanted:
            at.append([n, optimiser.param_groups[0]["lr"]])
        optimiser.step()
        s.step()
    return {"lr": LR, "warmup": warmup, "total": total, "at": at}


def main():
    torch.set_num_threads(1)
    x, y, fc1, fc2 = data()
    tensors = {
        "inputs": x,
        "labels": y,
        "initial.fc1": fc1,
        "initial.fc2": fc2,
        "initial.scores": score(fc1, fc2, x),
    }
    cases = {}
    for name, alpha, layerwise in (
        ("joint", ALPHA, False),
        ("joint_strong", 100 * ALPHA, False),
        ("layerwise", ALPHA, True),
    ):
        losses, out = train(x, y, fc1, fc2, alpha, layerwise)
        for got, want in zip(by_hand(x, y, fc1, fc2, alpha, layerwise), (out["step5.fc1"], out["step5.fc2"])):
            assert np.abs(got - want.double().numpy()).max() < 2e-6
        grads = torch.cat([out["grad.fc1"].flatten(), out["grad.fc2"].flatten()]).abs()
        clipped = int((grads > CLIP).sum())
        assert 0 < clipped < grads.numel() // 2 and (losses[-1] < losses[0]).all()
        # A first Adam step is lr * sign(g) unless |g| is near eps: no gradient may be that small.
        assert grads.min() > 1e-6, grads.min()
        print(name, "losses", losses.tolist(), "clipped", clipped, "of", grads.numel(), "min |g|", float(grads.min()))
        columns = losses.T.tolist() if layerwise else losses.tolist()
        cases[name] = {
            "alpha": alpha,
            "losses": [[f32(v) for v in c] for c in columns] if layerwise else [f32(v) for v in columns],
            "clipped": [clipped, grads.numel()],
        }
        tensors |= {f"{name}.{k}": t for k, t in out.items()}
    golden = {
        "layers": LAYERS,
        "rows": ROWS,
        "in": IN,
        "d_r": D_R,
        "kv_heads": KV_HEADS,
        "steps": STEPS,
        "lr": LR,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": DECAY,
        "clip_value": CLIP,
        "cases": cases,
        "schedule": schedule(),
    }
    (HERE / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")
    save_file({k: t.contiguous() for k, t in tensors.items()}, HERE / "golden.safetensors")
    (HERE / "golden.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
