"""A written ONNX file in ONNX Runtime's Java API, which is that of Android apps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lib.models import IMAGE, conv_model, example

RUNTIME = "com.microsoft.onnxruntime:onnxruntime:1.29.0"

PROGRAM = """
import ai.onnxruntime.*;
import java.nio.FloatBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;

class Run {
    public static void main(String[] args) throws Exception {
        OrtEnvironment environment = OrtEnvironment.getEnvironment();
        try (OrtSession session = environment.createSession(args[0])) {
            System.out.println(session.getMetadata().getCustomMetadataValue("cutlayer").get());
            String[] numbers = Files.readString(Path.of(args[1])).split(",");
            float[] x = new float[numbers.length];
            for (int i = 0; i < x.length; i++) x[i] = Float.parseFloat(numbers[i]);
            long[] shape = {Long.parseLong(args[2]), 1, 8, 8};
            OnnxTensor input = OnnxTensor.createTensor(environment, FloatBuffer.wrap(x), shape);
            try (OrtSession.Result result = session.run(Map.of("x", input))) {
                float[][] logits = (float[][]) result.get("head").get().getValue();
                for (float[] row : logits) for (float value : row) System.out.println(value);
            }
        }
    }
}
"""


WRITE = """
import sys
from pathlib import Path
from export.bundles.writer import Tier, export_bundles
from export.formats.ship import Choice, ship
from export.formats.trained import TrainedModel
from tests.lib.models import CLASSES, IMAGE, conv_model, example

folder, kind = Path(sys.argv[1]), sys.argv[2]
model = conv_model()
index = export_bundles(
    model, {"a": Tier(1, runtime="torch")}, folder / "bundles",
    example=example(IMAGE), classes=CLASSES, verified=False,
)
about = {"title": "t", "version": "0", "method": "m", "rounds": 1, "tiers": {}}
ship(TrainedModel(model, {"a": model}, index, about), Choice([kind]), folder / "out")
"""
"""Writes the model; in another process, as an engineer and an app are."""


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["onnx", "onnx-int8"])
def test_java_answers_as_the_model(format_: str, tmp_path: Path) -> None:
    for program in ("java", "javac", "mvn"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}; this test needs a JDK and Maven")
    local = [
        "mvn",
        "-q",
        "--color",
        "never",
        "help:evaluate",
        "-Dexpression=settings.localRepository",
        "-DforceStdout",
    ]
    get = ["mvn", "-q", "dependency:get", f"-Dartifact={RUNTIME}"]
    for command in (get, local):
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if found.returncode != 0:
            pytest.skip("Maven cannot fetch ONNX Runtime for Java; this test needs its index")
    group, name, version = RUNTIME.split(":")
    folder = Path(found.stdout.replace("\x1b[0m", "").strip()).joinpath(
        *group.split("."), name, version
    )
    jar = folder / f"{name}-{version}.jar"
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path), format_], check=True)
    (file,) = (tmp_path / "out").glob("*.onnx")
    model, x = conv_model(), example(IMAGE, 3)
    (tmp_path / "Run.java").write_text(PROGRAM)
    subprocess.run(
        ["javac", "-cp", str(jar), "-d", str(tmp_path), str(tmp_path / "Run.java")], check=True
    )
    numbers = tmp_path / "x.txt"
    numbers.write_text(",".join(repr(float(value)) for value in x.flatten()))
    done = subprocess.run(
        ["java", "-cp", f"{jar}:{tmp_path}", "Run",
         str(file), str(numbers), "3"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, *values = done.stdout.splitlines()
    assert '"method": "m"' in said
    with torch.no_grad():
        want = model.eval()(x).numpy()
    got = np.array([float(value) for value in values]).reshape(want.shape)
    tolerance = 1e-5 if format_ == "onnx" else 0.1
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
