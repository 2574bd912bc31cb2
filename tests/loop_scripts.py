"""Training scripts whose loops end in different ways."""

from __future__ import annotations

ACCUMULATE = """with accelerator.accumulate(model):
                clean = batch["point"]
                noise = torch.randn_like(clean)
                t = torch.randint(0, 1000, (len(clean),))
                loss = (model(clean + noise * t.reshape(-1, 1) / 1000, t) - noise).pow(2).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step(); scheduler.step(); optimizer.zero_grad()
                total += loss.detach()
            if accelerator.sync_gradients:
                losses.append([global_step, loss.item(), total.item()]); global_step += 1
"""


BREAK = (
    ACCUMULATE
    + """
            if global_step >= args.max_train_steps:
                break
"""
)
