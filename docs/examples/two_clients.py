"""Two clients, one dense layer, ten rounds of federated averaging, metrics printed each round.

A third participant of weight 0 takes part: of two, each could read the other's update off the sum.
"""

import copy

import numpy as np
import torch

from protocols import ServerOptimizer, SiteData, local_update, secure_mean
from protocols.fedavg import evaluate
from protocols.study import Server, Training

D1 = np.array([[1, 0], [0, 1], [1, 1]], np.float32), np.array([1, 0, 1], np.float32)
D2 = np.array([[1, 1], [0, 0], [1, 0]], np.float32), np.array([1, 0, 1], np.float32)
CPU = torch.device("cpu")

clients = {name: SiteData(name, ("x1", "x2"), x, y, x, y) for name, (x, y) in {"one": D1, "two": D2}.items()}
training = Training(local_epochs=5, batch_size=3, learning_rate=0.5)

torch.manual_seed(0)
model = torch.nn.Linear(2, 1)  # the sigmoid is in the loss
server = ServerOptimizer(model, Server())  # SGD with rate 1: plain federated averaging

for number in range(1, 11):
    updates = {"observer": np.zeros(3, np.float32)}
    weights = {"observer": 0}
    for name, data in clients.items():
        update = local_update(copy.deepcopy(model), data, training, CPU, seed=(0,), steps_done=0)
        updates[name], weights[name] = update.values, update.weight
    total, mean = secure_mean(updates, weights, max_value=4.0, fraction_bits=20)
    server.step(mean)
    metrics = [evaluate(model, data, CPU) for data in clients.values()]
    accuracy = sum(m.accuracy * m.rows for m in metrics) / total
    loss = sum(m.log_loss * m.rows for m in metrics) / total
    print(f"round {number:2d}  rows {total}  loss {loss:.4f}  accuracy {accuracy:.3f}")
