"""A tk program and an exported model that classifies texts come in; what Triton's own client makes of `tk serve` goes out: with
its defaults, which send and ask for binary data, and with JSON, texts and the graph's own tensors, whose numbers are those of
`tk serve-batch --logits`. Needs the package tritonclient[http].

    python scripts/check_tritonclient.py TK DIR
"""

import json
import subprocess
import sys
import urllib.request

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

TEXTS = ["the good", "a", "naïve café in Ångström, 東京 and 😀", "rain in the morning, sun at night " * 3, "!?"]


def main(tk, model):
    records = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    command = [tk, "serve-batch", model, "--input", "-", "--logits", "--quiet"]
    lines = subprocess.run(command, input=records, text=True, capture_output=True, check=True).stdout
    wanted = [json.loads(line) for line in lines.splitlines()]
    command = [tk, "serve", f"model={model}", "--listen", "127.0.0.1:0", "--json", "--quiet"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = json.loads(server.stdout.readline())["address"]
        with triton.InferenceServerClient(address) as client:
            check(client, address, wanted)
    finally:
        server.terminate()
        assert server.wait(30) == 0


def tokens(address):
    """The ids of the texts with the model's own tokens, a row each, and which of them are no padding."""
    body = json.dumps({"inputs": TEXTS}).encode()
    request = urllib.request.Request(f"http://{address}/tokenize", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        rows = [[token["id"] for token in row] for row in json.load(answer)]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = row, 1
    return ids, mask


def check(client, address, wanted):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("model")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.is_model_ready("model", "1") and not client.is_model_ready("model", "2")
    about = client.get_model_metadata("model")
    takes = {tensor["name"]: tensor["datatype"] for tensor in about["inputs"]}
    gives = {tensor["name"]: tensor["datatype"] for tensor in about["outputs"]}
    assert takes["text"] == "BYTES" and takes["input_ids"] == "INT64" and gives["logits"] == "FP32", about

    texts = np.array([text.encode() for text in TEXTS], np.object_)
    ids, mask = tokens(address)
    logits = np.array([line["logits"] for line in wanted], np.float32)
    worst = 0.0

    def inputs(binary, kind=np.int64):
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        for name in sorted(given.keys() & takes.keys()):
            tensor = triton.InferInput(name, list(ids.shape), {np.int64: "INT64", np.int32: "INT32"}[kind])
            yield tensor.set_data_from_numpy(given[name].astype(kind), binary_data=binary)

    for binary in (True, False):
        text = triton.InferInput("text", [len(TEXTS)], "BYTES").set_data_from_numpy(texts, binary_data=binary)
        outputs = None if binary else [triton.InferRequestedOutput("answer", binary_data=False)]
        result = client.infer("model", [text], outputs=outputs, request_id="7")
        assert result.get_response()["id"] == "7"
        answers = [json.loads(answer) for answer in result.as_numpy("answer")]
        assert [answer["label"] for answer in answers] == [line["label"] for line in wanted]
        worst = max(worst, *(np.abs(np.subtract(a["logits"], w["logits"])).max() for a, w in zip(answers, wanted)))
        for kind in (np.int64, np.int32):
            for outputs in (None, [triton.InferRequestedOutput("logits", binary_data=binary)]):
                version = "1" if outputs else ""
                result = client.infer("model", list(inputs(binary, kind)), version, outputs)
                found = result.as_numpy("logits")
                assert found.shape == logits.shape and found.dtype == np.float32, (found.shape, found.dtype)
                worst = max(worst, np.abs(found - logits).max())
    assert worst < 1e-4, worst

    for outputs in (["answer"], ["logits", "logits"]):
        try:
            client.infer("model", list(inputs(True)), outputs=list(map(triton.InferRequestedOutput, outputs)))
            sys.exit(f"{outputs} of tensors are given")
        except InferenceServerException as refused:
            assert refused.status() == "422" and outputs[0] in refused.message(), refused
    print(f"tritonclient.http: texts and tensors, binary and JSON; logits within {worst:.1e} of serve-batch's")


main(*sys.argv[1:])
