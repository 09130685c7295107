"""FedSGD by hand: opposite gradients average to zero, so no model moves.

Two clients hold gradients [1, 1] and [-1, -1] at theta = [0, 0]. The server learns their mean, [0, 0], and neither of
the two. A third participant of weight 0 takes part, because of two each could read the other off the sum.
"""

import numpy as np

from protocols import secure_mean

theta = np.zeros(2)
alpha = 0.1
gradients = {"one": np.array([1.0, 1.0]), "two": np.array([-1.0, -1.0]), "observer": np.zeros(2)}
weights = {"one": 1, "two": 1, "observer": 0}

for number in range(1, 4):
    _, mean_gradient = secure_mean(gradients, weights, max_value=1.0)
    theta = theta - alpha * mean_gradient
    print(f"round {number}: mean gradient {mean_gradient + 0.0}, theta {theta + 0.0}")
