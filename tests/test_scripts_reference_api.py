"""Three scripts in the style of the library's earlier generations, run as users have them.

They use only entry points and arguments of those versions, read the two whole-module files back, and compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from only_train_once import OTO


class BasicBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """ResNet18 for 32x32 images, with narrow layers."""

    def __init__(self, planes: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.layer1 = nn.Sequential(BasicBlock(planes, planes), BasicBlock(planes, planes))
        self.layer2 = nn.Sequential(BasicBlock(planes, 2 * planes, 2), BasicBlock(2 * planes, 2 * planes))
        self.layer3 = nn.Sequential(BasicBlock(2 * planes, 4 * planes, 2), BasicBlock(4 * planes, 4 * planes))
        self.layer4 = nn.Sequential(BasicBlock(4 * planes, 8 * planes, 2), BasicBlock(8 * planes, 8 * planes))
        self.linear = nn.Linear(8 * planes, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = F.avg_pool2d(out, 4)
        return self.linear(out.view(out.size(0), -1))


def test_cifar_classifier_with_hesso(tmp_path: Path) -> None:
    model = ResNet()
    oto = OTO(model=model, dummy_input=torch.rand(1, 3, 32, 32))
    oto.visualize(view=False, out_dir=str(tmp_path))
    full_flops = oto.compute_flops(in_million=True)["total"]
    full_params = oto.compute_num_params(in_million=True)

    steps_per_epoch = 2
    optimizer = oto.hesso(
        variant="sgd",
        lr=0.05,
        weight_decay=1e-4,
        target_group_sparsity=0.6,
        start_pruning_step=1 * steps_per_epoch,
        pruning_periods=3,
        pruning_steps=3 * steps_per_epoch,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    criterion = nn.CrossEntropyLoss()
    for _ in range(5):
        model.train()
        for x, y in _images(steps_per_epoch):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        scheduler.step()
        sparsity, norm, zero_groups = optimizer.compute_group_sparsity_param_norm()
        important, redundant, num_important, num_redundant = optimizer.compute_norm_groups()
        assert optimizer.get_learning_rate() > 0
    assert sparsity == pytest.approx(0.6, abs=0.01)
    assert zero_groups == num_redundant > 0
    assert norm > 0
    assert important > 0
    assert redundant == 0
    assert num_important > 0

    oto.construct_subnet(out_dir=str(tmp_path))
    full_model = torch.load(oto.full_group_sparse_model_path, weights_only=False).eval()
    compressed_model = torch.load(oto.compressed_model_path, weights_only=False).eval()
    assert Path(oto.compressed_model_path).stat().st_size < Path(oto.full_group_sparse_model_path).stat().st_size
    x = torch.rand(5, 3, 32, 32)
    full_output, compressed_output = full_model(x), compressed_model(x)
    assert (full_output - compressed_output).abs().max() <= 1e-4 * full_output.abs().max()

    oto_compressed = OTO(compressed_model, torch.rand(1, 3, 32, 32))
    assert oto_compressed.compute_flops(in_million=True)["total"] < 0.6 * full_flops
    assert oto_compressed.compute_num_params(in_million=True) < 0.6 * full_params


def _images(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        yield torch.randn(8, 3, 32, 32), torch.randint(10, (8,))


class Cascade(nn.Module):
    """Residual blocks whose outputs are concatenated, with a 1x1 convolution after each concatenation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.b1, self.b2 = ResidualBlock(width), ResidualBlock(width)
        self.c1 = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.ReLU(inplace=True))
        self.c2 = nn.Sequential(nn.Conv2d(3 * width, width, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        c0 = o0 = x
        b1 = self.b1(o0)
        c1 = torch.cat([c0, b1], dim=1)
        o1 = self.c1(c1)
        b2 = self.b2(o1)
        c2 = torch.cat([c1, b2], dim=1)
        return self.c2(c2)


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


class SuperResolution(nn.Module):
    """CARN-like: cascades, global concatenation, pixel shuffle; the scale is a Python integer input."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1))
        self.entry = nn.Conv2d(3, width, 3, 1, 1)
        self.b1, self.b2 = Cascade(width), Cascade(width)
        self.c1 = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.ReLU(inplace=True))
        self.c2 = nn.Sequential(nn.Conv2d(3 * width, width, 1), nn.ReLU(inplace=True))
        self.upsample = nn.ModuleDict(
            {"2": nn.Sequential(nn.Conv2d(width, 4 * width, 3, 1, 1), nn.ReLU(inplace=True), nn.PixelShuffle(2))}
        )
        self.exit = nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x: Tensor, scale: int) -> Tensor:
        x = self.entry(x - self.mean)
        c0 = o0 = x
        b1 = self.b1(o0)
        c1 = torch.cat([c0, b1], dim=1)
        o1 = self.c1(c1)
        b2 = self.b2(o1)
        c2 = torch.cat([c1, b2], dim=1)
        o2 = self.c2(c2)
        return self.exit(self.upsample[str(scale)](o2)) + self.mean


def test_super_resolution_with_random_zero_groups(tmp_path: Path) -> None:
    model = SuperResolution()
    dummy_input = (torch.rand(1, 3, 16, 16), 2)
    oto = OTO(model, dummy_input)
    oto.random_set_zero_groups()
    oto.construct_subnet(out_dir=str(tmp_path))
    full_model = torch.load(oto.full_group_sparse_model_path, weights_only=False)
    compressed_model = torch.load(oto.compressed_model_path, weights_only=False)
    full_output, compressed_output = full_model(*dummy_input), compressed_model(*dummy_input)
    assert full_output.shape == (1, 3, 32, 32)
    assert (full_output - compressed_output).abs().max() <= 1e-4
    assert _parameters(compressed_model) < _parameters(full_model)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_language_model_with_strict_out_nodes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    input_ids = torch.randint(97, (1, 12))
    oto = OTO(model, dummy_input=(input_ids,), strict_out_nodes=True)
    oto.random_set_zero_groups()
    oto.construct_subnet(
        merge_lora_to_base=False,
        export_huggingface_format=False,
        export_float16=False,
        full_group_sparse_model_dir=str(tmp_path / "full"),
        compressed_model_dir=str(tmp_path / "compressed"),
        ckpt_format="torch",
    )
    full_model = torch.load(oto.full_group_sparse_model_path, weights_only=False)
    compressed_model = torch.load(oto.compressed_model_path, weights_only=False)
    for ids in (input_ids, torch.randint(97, (3, 9))):
        full_logits, compressed_logits = full_model(ids).logits, compressed_model(ids).logits
        assert full_logits.shape == compressed_logits.shape
        assert (full_logits - compressed_logits).abs().max() <= 1e-4
    different = full_model(torch.randint(97, (1, 12))).logits
    assert (different - full_model(input_ids).logits).abs().max() > 1e-2  # the comparison can fail
    assert _parameters(compressed_model) < _parameters(full_model)
