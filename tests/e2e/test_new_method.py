"""A new heatmap method is one file, the one that the documentation shows: nothing else has to know of it."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

import numpy as np

import service
from tests.documents import files
from tests.server import running


def test_a_file_in_the_package_is_a_method_of_the_service(tmp_path: Path, repository: Path, chelsea: bytes) -> None:
    shutil.copytree(Path(service.__file__).parent, tmp_path / "service")
    ((name, text),) = files("docs/adding-a-method.md").items()
    (tmp_path / name).write_text(text)
    models, place = ("--models", str(repository)), str(tmp_path)
    with running(tmp_path, *models, PYTHONPATH=place, PYTHONSAFEPATH="1") as server, server.client() as client:
        listed = {method["name"]: method for method in client.get("/methods").json()["methods"]}
        assert listed["brightest"]["gen_params"]["properties"]["times"]["maximum"] == 10

        url, headers = "/models/tiny/heatmap?method=brightest", {"content-type": "image/png"}

        def maximum(gen_params: str) -> float:
            query = f"&format=npy&size=model&target_classes=1&gen_params={gen_params}"
            answer = client.post(url + query, content=chelsea, headers=headers)
            assert answer.status_code == 200, answer.text
            (heatmap,) = answer.json()["results"][0]["heatmaps"]
            values = np.load(io.BytesIO(base64.b64decode(heatmap["data"])))
            assert heatmap["gen_params"]["scaling"] == "none"
            return float(values.max())

        twice, thrice = maximum('{"scaling":"none"}'), maximum('{"scaling":"none","times":3}')
        assert twice > 0
        assert abs(thrice / twice - 1.5) < 1e-4
        wrong = client.post(url + '&gen_params={"times":11}', content=chelsea, headers=headers)
        assert wrong.status_code == 422
        assert wrong.json()["errors"][0]["pointer"] == "/gen_params/times"
