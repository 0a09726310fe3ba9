"""How evenly routers use their experts: the two losses that keep them in use, and what a run reports of it.

All are functions of `RouterSums`, sums over tokens and layers that are divided here, once. The sums of a batch are the
same on any mesh, so the losses are, too. Both losses are means over the tokens of a microbatch, unlike the sums of
`training.losses`, and the balance loss is a product of two such means: the step weighs each microbatch by its trained
tokens. With one microbatch that is the loss of the global batch; with more, each balances its own tokens, which asks
for a little more than a balanced batch does. The metrics are always those of the whole batch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.layers.config import Experts
from jaxllm.layers.moe import RouterSums
from jaxllm.models.build import Params


def balance_loss(sums: RouterSums) -> Float[Array, ""]:
    """Return E sum_e f_e P_e: A if all experts are used alike, up to E if the same A are always taken.

    f_e is how often expert e is chosen per token (they sum to A), P_e its mean probability, both over the tokens of all
    layers together, as in transformers' load_balancing_loss_func. Only P has a gradient.

    Source: Fedus et al. 2021 (Switch Transformer), equations 4 to 6, where A = 1 and each layer has its own loss.
    """
    tokens = jnp.maximum(jnp.sum(sums.tokens), 1.0)
    chosen, probs = jnp.sum(sums.counts, axis=0) / tokens, jnp.sum(sums.probs, axis=0) / tokens
    return chosen.shape[0] * jnp.sum(chosen * probs)


def z_loss(sums: RouterSums) -> Float[Array, ""]:
    """Return the mean of log_z^2 over tokens and layers, log_z = logsumexp of a router's logits.

    Source: Zoph et al. 2022 (ST-MoE), equation 5, where it is summed over layers.
    """
    return jnp.sum(sums.z) / jnp.maximum(jnp.sum(sums.tokens), 1.0)


def router_loss(sums: RouterSums, config: Experts) -> Float[Array, ""]:
    """Return what routing adds to the mean loss of a token."""
    return config.balance * balance_loss(sums) + config.router_z * z_loss(sums)


def move_biases(params: Params, sums: RouterSums, size: float) -> Params:
    """Return the parameters with the biases that experts are chosen by moved towards an even load.

    b_e += size * sign(mean_e(c_e) - c_e), with c_e how often expert e of the layer was chosen.
    Source: Wang et al. 2024 (auxiliary-loss-free load balancing), algorithm 1; DeepSeek-V3, 2024, section 2.1.2.
    """
    blocks = params["blocks"]
    move = size * jnp.sign(jnp.mean(sums.counts, axis=-1, keepdims=True) - sums.counts)
    ffn = {**blocks["ffn"], "choice_bias": blocks["ffn"]["choice_bias"] + move}
    return {**params, "blocks": {**blocks, "ffn": ffn}}


def router_metrics(sums: RouterSums, config: Experts) -> dict[str, Float[Array, ""]]:
    """Return how evenly experts are used.

    Returns:
      router_balance, router_z: the two losses, before their weights.
      router_busiest: share of the tokens that go through the busiest expert of any layer; A / E is the least.
      router_entropy: of the choices of a layer, mean over layers; 1 = all experts alike, 0 = always the same one.
    """
    share = sums.counts / jnp.maximum(sums.tokens, 1.0)[:, None]
    chosen = share / config.top_k
    entropy = -jnp.sum(chosen * jnp.log(jnp.maximum(chosen, 1e-30)), axis=-1) / jnp.log(max(config.number, 2))
    return {
        "router_balance": balance_loss(sums), "router_z": z_loss(sums), "router_busiest": jnp.max(share),
        "router_entropy": jnp.mean(entropy),
    }  # fmt: skip
