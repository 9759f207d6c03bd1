"""A pretended accelerator for machines without one: tensors say device='gpu:0' and compute on the CPU.

    with FakeGPU() as gpu:
        model.to('gpu:0')
        ...
    gpu.mixed, gpu.syncs, gpu.peak

It refuses what CUDA refuses: tensors of two devices in one operation, with CUDA's two exceptions (numbers without dimensions,
and indices that lie on the CPU), and `.numpy()` of a tensor on the device. It counts what CUDA hides: waiting for the device
(`.item()`, copies to the CPU, indexing by a mask), bytes moved from and to the host, and the bytes alive on each device, with
their peak with the lines that hold it. It does not know streams or kernels.

    with FakeGPU(dry=True) as gpu:
        gpu.place(model_on_meta)
        ...
    gpu.flops, gpu.seconds(A6000)

A dry one holds no numbers: tensors on the device have shapes alone, so that a model of any size fits, and what comes back to the CPU is made up.
It also counts floating point operations by kind and precision, and bytes that operations read and write; a roofline turns them into seconds.

The device is PyTorch's spare one, PrivateUse1, under the name `gpu`. Importing this module registers it for the whole process.
"""
import collections
import contextlib
import math
import os
import sys
import weakref

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    "What `torch.gpu` answers."
    def device_count(self): return 4
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]
    def is_bf16_supported(self, *args, **kw): return True
    def is_autocast_enabled(self): return False
    def empty_cache(self): pass
    def synchronize(self, *args): pass
    def set_device(self, *args): pass
    def get_rng_state(self, *args): return torch.get_rng_state()
    def set_rng_state(self, *args): pass

    class device:
        def __init__(self, index): pass
        def __enter__(self): pass
        def __exit__(self, *args): pass


torch.ones(1, requires_grad=True).sum().backward()  # autograd starts its threads before there is a device that they would ask
_device_constructors()  # remembered by PyTorch for `with torch.device(...)`; has to know `torch.tensor` as it was
_setup_privateuseone_for_python_backend('gpu', Backend())


def device(index=0): return torch.device('gpu', index)


def is_gpu(d): return d is not None and torch.device(d).type == 'gpu'


def placed(d):
    "A device with its number."
    return device() if d.index is None else d


def n_bytes(t): return t.numel()*t.element_size()


def location():
    "A function that says where in prunebook a tensor was made; quick, because it is asked of every tensor."
    frame = sys._getframe(1)
    while frame is not None and '/prunebook/' not in frame.f_code.co_filename: frame = frame.f_back
    if frame is None: return lambda: 'elsewhere'
    name, line = frame.f_code.co_filename, frame.f_lineno
    return lambda: f'{os.path.basename(name)}:{line}'


def where():
    "The innermost line of prunebook, or else of whoever called PyTorch."
    other, frame = None, sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        line = f'{os.path.basename(path)}:{frame.f_lineno}'
        if '/prunebook/' in path: return line
        if other is None and 'fake_gpu' not in path and '/torch/' not in path: other = line
        frame = frame.f_back
    return other


class GPUTensor(torch.Tensor):
    "A tensor that says it is on a `gpu`; its numbers are in `inner`, on the CPU."
    @staticmethod
    def __new__(cls, inner, where):
        kw = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, layout=inner.layout, device=where)
        t = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **kw)
        t.inner = inner
        return t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if FakeGPU.current is None: raise RuntimeError(f'{func} on a gpu tensor outside of FakeGPU.')
        return FakeGPU.current.handle(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **kw): return f'GPUTensor({self.cpu()!r}, device={str(self.device)!r})'
    def __format__(self, spec): return format(self.item(), spec) if self.ndim == 0 else repr(self)
    def __deepcopy__(self, memo):
        "A copy, whatever `inner` shares; a parameter stays one."
        if id(self) not in memo:
            copy = self.detach().clone()
            param = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if param else copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    # PyTorch refuses these for subclasses, not for devices
    def tolist(self): return self.cpu().tolist()
    def item(self): return self.cpu().item()
    def data_ptr(self): return self.inner.data_ptr()
    def untyped_storage(self): return self.inner.untyped_storage()

    # lists in an index become tensors on the device; PyTorch makes them where no emulation sees it
    def _indices(self, index):
        if isinstance(index, list): return torch.tensor(index).to(self.device)
        return tuple(self._indices(i) if isinstance(i, list) else i for i in index) if isinstance(index, tuple) else index

    def __getitem__(self, index): return super().__getitem__(self._indices(index))
    def __setitem__(self, index, value): super().__setitem__(self._indices(index), value)

    def numpy(self, *args, **kw):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def __array__(self, *args, **kw): return self.numpy()


class Generator(torch.Generator):
    "Random numbers for a device; those of `gpu` come from the CPU."
    on_gpu = set()  # addresses: operations see another Python object for the same generator

    def __new__(cls, place='cpu'):
        if not is_gpu(place): return torch_generator(place)
        g = super().__new__(cls, 'cpu')
        cls.on_gpu.add(g._cdata)
        weakref.finalize(g, cls.on_gpu.discard, g._cdata).atexit = False
        return g


torch_generator = torch.Generator


# ---- operations

VIEWS = {'view', 't', 'transpose', 'slice', 'select', 'unsqueeze', 'squeeze', 'expand', 'permute', 'detach', 'alias', '_unsafe_view', 'split',
         'split_with_sizes', 'unbind', 'as_strided', 'diagonal', 'unfold', '_reshape_alias', 'lift_fresh'}


PRODUCTS = dict(mm=lambda a, b: 2*math.prod(a)*b[-1], bmm=lambda a, b: 2*math.prod(a)*b[-1], mv=lambda a, b: 2*math.prod(a),
                addmm=lambda c, a, b: 2*math.prod(a)*b[-1], baddbmm=lambda c, a, b: 2*math.prod(a)*b[-1])
SOLVERS = dict(linalg_cholesky_ex=lambda a: math.prod(a)*a[-1]/3, cholesky_inverse=lambda a: 2*a[-1]**3/3, linalg_inv_ex=lambda a: 2*math.prod(a)*a[-1],
               linalg_solve_triangular=lambda a, b: math.prod(b)*a[-1], _linalg_solve_ex=lambda a, b: 2*math.prod(a)*a[-1]/3 + 2*math.prod(b)*a[-1],
               _linalg_eigh=lambda a: 9*math.prod(a)*a[-1], _linalg_svd=lambda a: 20*math.prod(a)*min(a[-2:]))


def flops(name, tensors):
    "Kind and floating point operations of an operation."
    for kind, known in (('product', PRODUCTS), ('solver', SOLVERS)):
        if name in known: return kind, known[name](*[tuple(t.shape) for t in tensors][:known[name].__code__.co_argcount])
    return 'memory', 0


def precision(kind, tensors):
    "What it is computed in; products of float32 in TF32 where PyTorch is told so."
    dtype = next((t.dtype for t in tensors if t.dtype.is_floating_point), torch.float32)
    if kind == 'product' and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == 'tf32': return 'tf32'
    return {torch.float64: 'f64', torch.bfloat16: 'f16', torch.float16: 'f16'}.get(dtype, 'f32')


# TFLOP/s without sparsity, GB/s of the memory, and what is reached of them
A6000 = dict(f16=154.8, tf32=77.4, f32=38.7, f64=.605, memory=768)
REACHED = dict(product=.65, solver=.4, memory=.75)
LAUNCH = 4e-6  # seconds of a kernel that does nothing


WAITS = {'nonzero', 'masked_select', '_unique2', 'unique_dim', 'unique_consecutive', 'bincount', '_local_scalar_dense', 'is_nonzero', 'equal'}
INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_'}


class FakeGPU(TorchDispatchMode):
    "Context manager in which `gpu:0` to `gpu:3` exist; `strict` raises for mixed devices, otherwise they are only counted."
    current = None

    def __init__(self, strict=True, dry=False):
        super().__init__()
        self.strict, self.dry = strict, dry
        self.mixed = collections.Counter()  # operations on tensors of two devices, by line
        self.syncs = collections.Counter()  # times the host waits for the device, by line and reason
        self.to_device, self.to_host = collections.Counter(), collections.Counter()  # bytes moved, by line
        self.alive, self.peak = collections.Counter(), collections.Counter()  # bytes, by device
        self.work = collections.Counter()  # operations that were run, by kind, precision, flops, and bytes read and written
        self._storages = {}  # (storage, device index) -> [tensors, bytes, line]
        self._at_peak = {}

    def __enter__(self):
        FakeGPU.current = self
        self._exits = contextlib.ExitStack()
        self._exits.enter_context(torch.autograd.set_multithreading_enabled(False))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._exits.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        self._replace(torch.nn.functional, 'scaled_dot_product_attention', self._attention)
        self._replace(torch.nn.Module, '_apply', self._conversion)
        self._replace(torch, 'tensor', self._new_tensor)
        self._replace(torch, 'Generator', lambda old: Generator)
        self._replace(torch.accelerator, 'synchronize', lambda old: lambda device=None: self._wait('torch.accelerator.synchronize'))
        return super().__enter__()

    def __exit__(self, *args):
        self._exits.close()
        FakeGPU.current = None
        return super().__exit__(*args)

    def _replace(self, owner, name, make):
        old = getattr(owner, name)
        setattr(owner, name, make(old))
        self._exits.callback(setattr, owner, name, old)

    def _conversion(self, old):
        "PyTorch makes a new parameter for every module here; on a device, one that two modules share stays one."
        def apply(module, *args, **kw):
            names = collections.defaultdict(list)
            for name, p in module.named_parameters(remove_duplicate=False): names[id(p)].append(name)
            old(module, *args, **kw)
            for first, *others in names.values():
                for owner, _, name in (n.rpartition('.') for n in others): setattr(module.get_submodule(owner), name, module.get_parameter(first))
            return module
        return apply

    def _new_tensor(self, old):
        def tensor(data, *args, device=None, **kw):
            t = old(data, *args, **kw)
            return t if device is None else t.to(device)
        return tensor

    def _attention(self, old):
        "PyTorch chooses a kernel by the device before it dispatches, and has none for this one."
        def attention(q, k, v, attn_mask=None, dropout_p=0., is_causal=False, scale=None, enable_gqa=False, **kw):
            plain = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
            if not isinstance(q, GPUTensor): return old(q, k, v, attn_mask=attn_mask, **plain, **kw)
            self._check('scaled_dot_product_attention', [t for t in (q, k, v, attn_mask) if t is not None])
            if torch.is_grad_enabled() and q.requires_grad: return _attention_by_hand(q, k, v, attn_mask, is_causal, scale, enable_gqa)
            if self.dry:
                seen = math.prod(q.shape)*k.shape[2]*(1/2 if is_causal else 1)
                out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device='meta')
                return self._wrap(self._counted('product', [q, k, v], 4*seen, [out]), q.device)
            with torch._C._DisableTorchDispatch():
                out = old(q.inner, k.inner, v.inner, attn_mask=None if attn_mask is None else attn_mask.inner, **plain)
            return self._wrap(out, q.device)
        return attention

    # ---- what is counted

    def _check(self, name, tensors, found=None):
        "Are these tensors on one device? Numbers without dimensions may lie on the CPU."
        found = found or {t.device for t in tensors if isinstance(t, GPUTensor) or t.ndim}
        if len(found) < 2: return
        what = f'{where()}: {name} on {", ".join(sorted(map(str, found)))}'
        self.mixed[what] += 1
        if self.strict: raise RuntimeError(f'Expected all tensors to be on the same device: {what}')

    def _wait(self, why): self.syncs[f'{where()}: {why}'] += 1

    def _wrap(self, inner, where):
        "A tensor on a device, counted as long as it lives."
        t, storage = GPUTensor(inner, where), inner.untyped_storage()
        key, name = (storage._cdata, where.index), str(where)
        if key not in self._storages:
            self._storages[key] = [0, storage.nbytes(), location()]
            self.alive[name] += storage.nbytes()
            if self.alive[name] > self.peak[name]: self._new_peak(name, where.index)
        self._storages[key][0] += 1
        weakref.finalize(t, self._forget, key, name).atexit = False
        return t

    def _forget(self, key, name):
        self._storages[key][0] -= 1
        if not self._storages[key][0]: self.alive[name] -= self._storages.pop(key)[1]

    def _new_peak(self, name, index):
        "Remember what is alive, where the peak is a hundredth above the last one that was remembered."
        self.peak[name] = self.alive[name]
        if self.peak[name] < 1.01*self._at_peak.get(name, (0,))[0]: return
        self._at_peak[name] = self.peak[name], [(line, n) for (_, i), (_, n, line) in self._storages.items() if i == index]

    def held(self, name='gpu:0'):
        "Bytes that were alive near the peak, by the line that made them."
        lines = collections.Counter()
        for line, n in self._at_peak[name][1]: lines[line()] += n
        return lines

    def begin(self):
        "Forget what was counted; the peak starts from what is alive."
        for c in (self.mixed, self.syncs, self.to_device, self.to_host, self.work, self._at_peak): c.clear()
        self.peak = self.alive.copy()

    def place(self, model, where='gpu:0'):
        "Put a model that is on `meta` on a dry device."
        for m in model.modules():
            for of in (m._parameters, m._buffers):
                for n, t in of.items():
                    if t is None: continue
                    new = self._wrap(t.detach(), torch.device(where))
                    of[n] = torch.nn.Parameter(new, t.requires_grad) if isinstance(t, torch.nn.Parameter) else new
        return model

    def _counted(self, kind, tensors, operations, results):
        "Count an operation; its first result."
        self.work[kind, precision(kind, tensors), operations, sum(map(n_bytes, tensors)) + sum(map(n_bytes, results))] += 1
        return results[0] if results else None

    def flops(self):
        "Floating point operations by precision."
        total = collections.Counter()
        for (_, p, n, _), times in self.work.items(): total[p] += n*times
        return total

    def seconds(self, card=A6000):
        "By kind and precision, what a card needs: as long as it computes, or as its memory reads and writes."
        total = collections.Counter()
        for (kind, p, n, moved), times in self.work.items():
            total[kind, p] += times*(LAUNCH + max(n/(card[p]*1e12*REACHED[kind]), moved/(card['memory']*1e9*REACHED['memory'])))
        return total

    # ---- dispatch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return self.handle(func, args, kwargs or {})

    def handle(self, func, args, kwargs):
        "Run one operation on the CPU, and put what it gives where CUDA would."
        name, wanted = func._schema.name.split('::')[1], kwargs.get('device')
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, GPUTensor)]
        if not ours and not is_gpu(wanted): return func(*args, **kwargs)
        if name == '_to_copy': return self._copy(func, args[0], kwargs)
        if name == 'copy_': return self._copy_into(*args[:2])
        if name in WAITS: self._wait(name)
        if self.dry and name in ('_local_scalar_dense', 'is_nonzero', 'equal') and ours[0].inner.is_meta: return made_up(args[0], name)
        if name in INDEXING: self._check_index(name, args)
        else: self._check(name, tensors)
        target = torch.device(wanted) if wanted is not None else args[0].device if name in INDEXING else ours[0].device
        check_generator(name, target, kwargs.get('generator'))
        inner = lambda t: t.inner if isinstance(t, GPUTensor) else t
        kw = {k: torch.device('cpu') if k == 'device' and v is not None else v for k, v in kwargs.items() if k != 'pin_memory'}
        run = self._run_dry if self.dry else lambda func, args, kw: func(*args, **kw)
        out = run(func, tree_map(inner, args), tree_map(inner, kw))
        if self.dry and name not in VIEWS:
            read = [t for t in tensors if t.is_floating_point()] or tensors
            self._counted(*(lambda kind, n: (kind, read, n))(*flops(name, read)), [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        if func._schema.is_mutable and func._schema.returns: return self._mutated(func, args, kwargs, out)
        if not is_gpu(target): return out
        return tree_map(lambda t: self._wrap(t, placed(target)) if isinstance(t, torch.Tensor) else t, out)

    def _run_dry(self, func, args, kw):
        "On `meta`; indices and masks are real, as long as nothing but them is read."
        tensors = [t for t in tree_leaves((args, kw)) if isinstance(t, torch.Tensor)]
        known = not any(t.is_meta or t.is_floating_point() for t in tensors)
        if tensors and known: return func(*args, **kw)
        if func._schema.is_mutable:                            # a number that says how it went says that it went well
            for t in tensors:
                if not (t.is_meta or t.is_floating_point() or t.ndim): t.zero_()
        dry = lambda t: t.to('meta') if isinstance(t, torch.Tensor) else torch.device('meta') if isinstance(t, torch.device) else t
        out = func(*tree_map(dry, args), **tree_map(dry, kw))
        return out if tensors or out.is_floating_point() else func(*args, **kw)

    def _mutated(self, func, args, kwargs, out):
        "In-place operations return what they were given."
        given = [kwargs.get(a.name, args[i] if i < len(args) else None) for i, a in enumerate(func._schema.arguments)
                 if a.alias_info is not None and a.alias_info.is_write]
        return given[0] if not isinstance(out, (tuple, list)) else type(out)(given)

    def _copy(self, func, source, kwargs):
        target = torch.device(kwargs['device']) if kwargs.get('device') is not None else source.device
        kw = {k: v for k, v in kwargs.items() if k not in ('device', 'pin_memory', 'non_blocking')}
        data = source.inner if isinstance(source, GPUTensor) else source
        if target.type == 'meta': return data.to('meta')
        if self.dry: data = self._dry_copy(data, is_gpu(target), kw.get('dtype', data.dtype))
        out = func(data, **kw)
        if self.dry and is_gpu(target): self._counted('memory', [source], 0, [out])
        if is_gpu(target):
            if not isinstance(source, GPUTensor): self.to_device[where()] += n_bytes(source)
            return self._wrap(out, placed(target))
        self.to_host[where()] += n_bytes(source)
        self._wait('copy to the CPU')
        return out

    def _dry_copy(self, data, stays, dtype):
        "What to copy: numbers do not go to a dry device, and are made up on the way back."
        if not stays: return made_up(data) if data.is_meta else data
        return data.to('meta') if dtype.is_floating_point else data

    def _copy_into(self, target, source):
        ours = isinstance(target, GPUTensor), isinstance(source, GPUTensor)
        if ours == (True, False): self.to_device[where()] += n_bytes(source)
        if ours == (False, True):
            self.to_host[where()] += n_bytes(source)
            self._wait('copy to the CPU')
        if self.dry:
            self._counted('memory', [target, source], 0, [])
            if not ours[0]: target.copy_(made_up(source.inner) if source.inner.is_meta else source.inner)
            return target
        (target.inner if ours[0] else target).copy_(source.inner if ours[1] else source)
        return target

    def _check_index(self, name, args):
        "Indices may lie on the CPU, and are then copied; masks make the host wait."
        base, indices = args[0], [i for i in args[1] if i is not None]
        ours = [i for i in indices if isinstance(i, GPUTensor)]
        if any(i.dtype in (torch.bool, torch.uint8) for i in ours): self._wait('index by a mask')
        if isinstance(base, GPUTensor) and len(ours) < len(indices): self._wait('index from the CPU')
        values = [t.device for t in args[2:3] if isinstance(t, torch.Tensor) and t.ndim]
        self._check(name, (), {base.device, *(i.device for i in ours), *values})


def made_up(t, name='copy'):
    "What comes back from a dry device: numbers of the right shape."
    if name == 'equal' or name == 'is_nonzero': return True
    if t.dtype == torch.bool: found = torch.ones(t.shape, dtype=torch.bool)
    elif t.dtype.is_floating_point: found = torch.rand(t.shape).to(t.dtype)
    else: found = torch.zeros(t.shape, dtype=t.dtype) if t.ndim == 0 else torch.arange(t.shape[-1], dtype=t.dtype).expand(t.shape).clone()
    return found if name == 'copy' else found.item()


def check_generator(name, target, generator):
    "Random numbers come from a generator of the same kind of device."
    if generator is None: return
    kind = 'gpu' if generator._cdata in Generator.on_gpu else generator.device.type
    if kind != target.type: raise RuntimeError(f'Expected a {target.type!r} device type for generator but found {kind!r}: {where()}: {name}')


def _attention_by_hand(q, k, v, mask, is_causal, scale, enable_gqa):
    "Attention in operations that autograd knows."
    if enable_gqa: k, v = (t.repeat_interleave(q.shape[1]//t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(-2, -1))*(scale or q.shape[-1]**-.5)
    if is_causal: mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None: scores = scores.masked_fill(~mask, float('-inf')) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v
