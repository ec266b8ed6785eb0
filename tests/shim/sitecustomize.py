"""Loaded by Python at start-up in the trainer processes that tests launch; each part is switched on by a variable.

The trainer itself stays stock open_clip, started by the literal command line. What is changed around it:

* ARF_TEST_MODEL_CONFIGS  adds a folder of model configurations (open_clip has no flag for it)
* ARF_TEST_FP64           makes float64 the default type, so that gradients can be compared to 1e-10; FSDP sums them
                          in it, too (open_clip asks for float32)
* ARF_TEST_DDP_CPU        lets DistributedDataParallel run on CPU (open_clip passes device_ids=[cpu])
* ARF_TEST_RECORD         writes gradients and inputs of the first optimizer step to a file per rank
* ARF_TEST_RECORD_STEP    or of a later one, counted from 0; then also inputs and weights of those before it
* ARF_TEST_AT             at this moment of the run (1.5: the middle of the second epoch has just been logged) do
* ARF_TEST_DO             "kill SECONDS" later, "kill-in-fsync" when a file is written next, "touch FILE", or
                          "interrupt", or "interrupt twice", as Ctrl-C in a terminal does: the whole group
"""

import os
import sys

if "open_clip_train.main" in getattr(sys, "orig_argv", ()) or os.environ.get("ARF_TEST_SHIM_ALWAYS"):
    from pathlib import Path

    import torch

    torch.set_num_threads(1)
    if os.environ.get("ARF_TEST_FP64"):
        torch.set_default_dtype(torch.float64)
        from torch.distributed._composable import fsdp

        _original_policy = fsdp.MixedPrecisionPolicy
        fsdp.MixedPrecisionPolicy = lambda **dtypes: _original_policy(**{**dtypes, "reduce_dtype": None})

    if os.environ.get("ARF_TEST_MODEL_CONFIGS"):
        import open_clip

        open_clip.add_model_config(os.environ["ARF_TEST_MODEL_CONFIGS"])

    if os.environ.get("ARF_TEST_DDP_CPU"):
        _original_ddp_init = torch.nn.parallel.DistributedDataParallel.__init__

        def _ddp_init(self, module, device_ids=None, **kwargs):
            _original_ddp_init(self, module, device_ids=None, **kwargs)

        torch.nn.parallel.DistributedDataParallel.__init__ = _ddp_init

    if os.environ.get("ARF_TEST_RECORD"):
        import open_clip.model

        def _whole(tensor):
            return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()

        _inputs, _models, _earlier = [], [], []

        @torch.compiler.disable  # --torchcompile compiles what comes after it
        def _note(model, image, text):
            _inputs.append((image.clone(), None if text is None else text.clone()))
            _models[:] = [model]

        def _recording(original):
            def forward(self, image=None, text=None):
                if torch.is_grad_enabled() and self.training:
                    _note(self, image, text)
                return original(self, image, text)

            return forward

        for _kind in (open_clip.model.CLIP, open_clip.model.CustomTextCLIP):
            _kind.forward = _recording(_kind.forward)
        _original_step = torch.optim.AdamW.step

        def _step(self, closure=None):
            path = Path(f"{os.environ['ARF_TEST_RECORD']}.{os.environ.get('RANK', 0)}")
            _step.number = getattr(_step, "number", -1) + 1
            wanted = int(os.environ.get("ARF_TEST_RECORD_STEP", 0))
            if _step.number < wanted:
                weights = {name: _whole(p.detach()) for name, p in _models[0].named_parameters()}
                _earlier.append({"inputs": list(_inputs), "weights": weights})
            if _step.number == wanted:
                model = _models[0]
                record = {
                    "inputs": list(_inputs),
                    "earlier": _earlier,
                    "weights": {name: _whole(p.detach()) for name, p in model.named_parameters()},
                    "gradients": {
                        name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None
                    },
                }
                torch.save(record, path)
            _inputs.clear()
            return _original_step(self, closure)

        torch.optim.AdamW.step = _step

    if os.environ.get("ARF_TEST_AT"):
        import logging
        import re
        import signal
        import threading

        def _kill(*_):
            os.killpg(0, signal.SIGKILL)

        def _act(what, argument):
            if what == "touch":
                Path(argument).touch()
            elif what == "kill-in-fsync":
                os.fsync = _kill
            elif what == "interrupt":
                for _ in range(1 + (argument == "twice")):
                    os.killpg(0, signal.SIGINT)
            elif float(argument):
                threading.Timer(float(argument), _kill).start()
            else:
                _kill()

        class _Moment(logging.Handler):
            over = False

            def emit(self, record):
                logged = re.match(r"Train Epoch: (\d+) \[.*?\((\d+)%\)", record.getMessage())
                if (
                    not self.over
                    and logged
                    and int(logged[1]) + int(logged[2]) / 100 >= float(os.environ["ARF_TEST_AT"])
                ):
                    self.over = True
                    _act(*os.environ["ARF_TEST_DO"].partition(" ")[::2])

        logging.root.addHandler(_Moment())
