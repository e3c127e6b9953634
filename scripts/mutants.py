"""Files that are broken: bytes → the same with a few of them wrong, and an ONNX model → one that is well-formed and
nonsense. Everything is drawn from the generator that is handed in: the same seed gives the same mutants.

Only the standard library is used: protobuf's wire format is simple enough, and a library would refuse to write nonsense.
"""

# message → field → what message it holds (onnx.proto)
MESSAGES = {
    "Model": {7: "Graph", 8: "Opset", 14: "Entry"},
    "Graph": {1: "Node", 5: "Tensor", 11: "Value", 12: "Value", 13: "Value"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph"},
    "Tensor": {13: "Entry"},
    "Value": {2: "Type"},
    "Type": {1: "TensorType"},
    "TensorType": {2: "Shape"},
    "Shape": {1: "Dimension"},
    "Dimension": {},
    "Opset": {},
    "Entry": {},
}

HOSTILE = [0, 1, 2, 3, 7, 127, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, (1 << 62), (1 << 63) - 1,
           -1, -2, -7, -(1 << 31), -(1 << 63)]
OPERATORS = ["Add", "MatMul", "Gemm", "Gather", "Reshape", "Transpose", "Concat", "Slice", "Softmax", "LayerNormalization",
             "Unsqueeze", "Squeeze", "Shape", "Expand", "Cast", "Where", "ConstantOfShape", "Range", "Tile", "Resize",
             "Conv", "MaxPool", "ReduceMean", "CumSum", "ScatterND", "GatherND", "TopK", "OneHot", "Pad", "Split", "Erf",
             "Loop", "If", "Identity", "NonZero", "Einsum", "LSTM", "QuantizeLinear", "DequantizeLinear",
             "MatMulInteger", "DynamicQuantizeLinear", "GroupQueryAttention", "MatMulNBits", "Attention",
             "SkipLayerNormalization", "FastGelu", "BiasGelu", "EmbedLayerNormalization", "FusedMatMul", "NoSuchOperator"]
DOMAINS = ["", "com.microsoft", "com.ms.internal.nhwc", "ai.onnx.ml", "no.such.domain"]


def varint(buffer, at):
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def write_varint(value):
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def parse(buffer, message="Model"):
    """Bytes → a list of [field, wire type, value]; of messages, the value is such a list."""
    fields, at = [], 0
    while at < len(buffer):
        key, at = varint(buffer, at)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(buffer, at)
        elif kind == 2:
            length, at = varint(buffer, at)
            value, at = buffer[at:at + length], at + length
            inner = MESSAGES[message].get(field)
            if inner:
                value = parse(value, inner)
        else:
            width = {1: 8, 5: 4}[kind]
            value, at = buffer[at:at + width], at + width
        fields.append([field, kind, value])
    return fields


def encode(fields):
    out = bytearray()
    for field, kind, value in fields:
        out += write_varint(field << 3 | kind)
        if kind == 0:
            out += write_varint(value)
        elif kind == 2:
            value = encode(value) if isinstance(value, list) else value
            out += write_varint(len(value)) + value
        else:
            out += value
    return bytes(out)


def all_of(fields, field):
    return [entry for entry in fields if entry[0] == field]


def integers(fields, field):
    """A repeated integer, packed or not; and a way to write another list in its place."""
    values = []
    for _, kind, value in all_of(fields, field):
        if kind == 0:
            values.append(value)
        else:
            at = 0
            while at < len(value):
                number, at = varint(value, at)
                values.append(number)

    def put(new):
        fields[:] = [entry for entry in fields if entry[0] != field]
        if new:
            fields.append([field, 2, b"".join(write_varint(n) for n in new)])

    return values, put


def other_integers(random, values):
    values = list(values)
    choice = random.randrange(5)
    if choice == 0 and values:
        values[random.randrange(len(values))] = random.choice(HOSTILE)
    elif choice == 1 and values:
        del values[random.randrange(len(values))]
    elif choice == 2:
        values.insert(random.randint(0, len(values)), random.choice(HOSTILE))
    elif choice == 3:
        random.shuffle(values)
    else:
        values = [random.choice(HOSTILE) for _ in range(random.randint(0, 6))]
    return values


def of_tensor(random, tensor):
    choice = random.randrange(7)
    if choice < 2:
        values, put = integers(tensor, 1)
        put(other_integers(random, values))
        return "dims"
    if choice == 2:
        tensor[:] = [e for e in tensor if e[0] != 2] + [[2, 0, random.randint(0, 24)]]
        return "data_type"
    if choice == 3:
        for entry in all_of(tensor, 9):
            entry[2] = entry[2][:random.randint(0, len(entry[2]))] if random.random() < 0.6 else entry[2] * 2
        return "raw_data"
    if choice == 4:
        tensor[:] = [e for e in tensor if e[0] != 9]
        return "no raw_data"
    entries = all_of(tensor, 13)
    if entries and choice == 5:
        entry = random.choice(entries)[2]
        key = b"".join(e[2] for e in all_of(entry, 1))
        new = random.choice([b"../" * 9 + b"etc/passwd", b"/etc/passwd", b"", b"absent", b"\xff\x00", b"."]) \
            if key == b"location" else str(random.choice(HOSTILE)).encode()
        entry[:] = [e for e in entry if e[0] != 2] + [[2, 2, new]]
        return "external " + key.decode(errors="replace")
    entry = lambda key, value: [13, 2, [[1, 2, key], [2, 2, value]]]
    tensor[:] = [e for e in tensor if e[0] not in (9, 13, 14)] + [
        entry(b"location", random.choice([b"model.onnx", b"model.onnx_data", b"/dev/zero", b"tokenizer.json"])),
        entry(b"offset", str(random.choice(HOSTILE)).encode()),
        entry(b"length", str(random.choice(HOSTILE)).encode()),
        [14, 0, 1],
    ]
    return "made external"


def of_attribute(random, attribute):
    if all_of(attribute, 3) and random.random() < 0.7:
        for entry in all_of(attribute, 3):
            entry[2] = random.choice(HOSTILE)
        return "int"
    if all_of(attribute, 8) and random.random() < 0.7:
        values, put = integers(attribute, 8)
        put(other_integers(random, values))
        return "ints"
    if all_of(attribute, 5) and random.random() < 0.7:
        return "tensor's " + of_tensor(random, random.choice(all_of(attribute, 5))[2])
    if all_of(attribute, 2) and random.random() < 0.7:
        for entry in all_of(attribute, 2):
            entry[2] = random.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\0\0\0\0", b"\1\0\0\0"])
        return "float"
    if random.random() < 0.5:
        attribute[:] = [e for e in attribute if e[0] != 20] + [[20, 0, random.randint(0, 15)]]
        return "type"
    for entry in all_of(attribute, 1):
        entry[2] = random.choice([b"axis", b"axes", b"to", b"perm", b"num_heads", b"", b"value", b"body", b"epsilon"])
    return "name"


def of_node(random, graph, nodes):
    at = random.randrange(len(nodes))
    node = nodes[at][2]
    inputs, outputs, attributes = all_of(node, 1), all_of(node, 2), all_of(node, 5)
    names = [e[2] for n in nodes for e in all_of(n[2], 1) + all_of(n[2], 2)]
    choice = random.randrange(12)
    if choice < 3 and attributes:
        return "attribute " + of_attribute(random, random.choice(attributes)[2])
    if choice < 5 and inputs:
        random.choice(inputs)[2] = random.choice(names + [b"", b"absent"] + [e[2] for e in outputs])
        return "input"
    if choice == 5:
        random.shuffle(inputs)
        node[:] = inputs[:random.randint(0, len(inputs))] + [e for e in node if e[0] != 1]
        return "inputs cut"
    if choice == 6:
        node.insert(0, [1, 2, random.choice(names)])
        return "one more input"
    if choice == 7:
        node[:] = [e for e in node if e[0] != 4] + [[4, 2, random.choice(OPERATORS).encode()]]
        return "op_type"
    if choice == 8:
        node[:] = [e for e in node if e[0] != 7] + [[7, 2, random.choice(DOMAINS).encode()]]
        return "domain"
    if choice == 9 and attributes:
        node.remove(random.choice(attributes))
        return "attribute gone"
    if choice == 10:
        graph.remove(nodes[at])
        return "node gone"
    if outputs:
        random.choice(outputs)[2] = random.choice(names + [b""])
        return "output"
    return "nothing"


def of_value(random, value):
    for entry in all_of(value, 2):
        for tensor in all_of(entry[2], 1):
            if random.random() < 0.4:
                tensor[2][:] = [e for e in tensor[2] if e[0] != 1] + [[1, 0, random.randint(0, 24)]]
                return "element type"
            for shape in all_of(tensor[2], 2):
                dimensions = all_of(shape[2], 1)
                if dimensions and random.random() < 0.7:
                    random.choice(dimensions)[2][:] = [[1, 0, random.choice(HOSTILE)]]
                    return "dimension"
                shape[2][:] = dimensions[:random.randint(0, len(dimensions))]
                return "rank"
    for entry in all_of(value, 1):
        entry[2] = random.choice([b"input_ids", b"attention_mask", b"logits", b"", b"absent", b"position_ids"])
    return "name"


def numbers(random, graph):
    """Other numbers where all else fits together: what gets past a loader is found when it is computed."""
    nodes = [n[2] for n in all_of(graph, 1)]
    held = [t[2] for t in all_of(graph, 5)] + [t[2] for n in nodes for a in all_of(n, 5) for t in all_of(a[2], 5)]
    # shapes, axes and indices are a few int64
    small = [t for t in held if [e[2] for e in all_of(t, 2)] == [7] and 8 <= sum(len(e[2]) for e in all_of(t, 9)) <= 64]
    settings = [a[2] for n in nodes for a in all_of(n, 5) if all_of(a[2], 3) or all_of(a[2], 8)]
    for _ in range(random.choice([1, 1, 2])):
        if small and (random.random() < 0.5 or not settings):
            for entry in all_of(random.choice(small), 9):
                at = random.randrange(len(entry[2]) // 8) * 8
                number = random.choice(HOSTILE) & (1 << 64) - 1
                entry[2] = entry[2][:at] + number.to_bytes(8, "little") + entry[2][at + 8:]
        elif settings:
            attribute = random.choice(settings)
            for entry in all_of(attribute, 3):
                entry[2] = random.choice(HOSTILE)
            values, put = integers(attribute, 8)
            if values:
                put(other_integers(random, values))
    return "numbers"


def nonsense(random, model):
    """An ONNX file → one that is well-formed protobuf, and what was changed."""
    model = parse(model)
    graph = all_of(model, 7)[0][2]
    if random.random() < 0.4:
        changed = numbers(random, graph)
        return encode(model), changed
    changes = []
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        nodes, tensors = all_of(graph, 1), all_of(graph, 5)
        values = all_of(graph, 11) + all_of(graph, 12)
        choice = random.random()
        if choice < 0.5 and nodes:
            changes.append("node: " + of_node(random, graph, nodes))
        elif choice < 0.8 and tensors:
            # small tensors are shapes and axes: what is computed hangs on them
            small = [t for t in tensors if sum(len(e[2]) for e in all_of(t[2], 9)) <= 64] or tensors
            changes.append("tensor: " + of_tensor(random, random.choice(random.choice([small, tensors]))[2]))
        elif choice < 0.9 and values:
            changes.append("value: " + of_value(random, random.choice(values)[2]))
        elif choice < 0.95:
            for opset in all_of(model, 8):
                opset[2][:] = [e for e in opset[2] if e[0] != 2] + [[2, 0, random.choice(HOSTILE + [7, 13, 17, 21, 24])]]
            changes.append("opset")
        else:
            model[:] = [e for e in model if e[0] != 1] + [[1, 0, random.choice(HOSTILE)]]
            changes.append("ir_version")
    return encode(model), ", ".join(changes)


def broken(random, data):
    """Bytes → the same with some of them flipped, cut off, doubled or overwritten, and what was done."""
    data = bytearray(data)
    choice = random.randrange(6)
    if choice < 3 or not data:
        for _ in range(random.choice([1, 1, 2, 8])):
            if data:
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(data), "bits flipped"
    at = random.randrange(len(data))
    if choice == 3:
        return bytes(data[:at]), f"cut to {at} bytes"
    if choice == 4:
        length = random.randint(1, 64)
        data[at:at + length] = random.randbytes(length)
        return bytes(data), f"{length} bytes at {at} at random"
    length = random.randint(1, 4096)
    data[at:at] = data[at:at + length]
    return bytes(data), f"{length} bytes at {at} twice"
