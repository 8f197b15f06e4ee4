"""The conditional VAE (Kingma & Welling 2013; Sohn et al. 2015), with a per-sample ELBO.

x = linear(z, c) + residual(z, c): the linear part, where there is one, is the closed-form solution from private
moments; encoder and decoder are its residuals and start at zero, so training can only add to it. The condition
enters at three places that a code cannot bypass: the conditional mean, the prior p(z|c), and FiLM.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medvae.config import ModelConfig
from medvae.errors import ConfigError
from medvae.nets.adversary import Critic
from medvae.nets.blocks import ClassDecoders, Decoder, Encoder, level_sizes
from medvae.nets.codes import CodeFlow, CodeMixture
from medvae.nets.labels import Labels
from medvae.nets.likelihood import LIKELIHOODS, bernoulli
from medvae.nets.linear import LinearPart
from medvae.nets.prior import FieldPrior, NormalPrior
from medvae.nets.shape import sharpened
from medvae.types import Condition, ImageSpace

# Posterior variance of a code before training, and the bounds that keep its logarithm tame under noise.
INITIAL_LOG_VARIANCE = -2.0
LOG_VARIANCE_BOUNDS = (-8.0, 2.0)
# Share of training after which an annealed beta has its full size.
ANNEALED = 0.5
# Probabilities of the linear part are kept this far from 0 and 1, where a logit has no bound.
PROBABILITY_MARGIN = 0.01


def logit(p: Tensor) -> Tensor:
    """Return log(p / (1 - p)) with p clamped away from 0 and 1."""
    return torch.logit(p.clamp(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN))


class ConditionalVAE(nn.Module):
    """A conditional VAE over images (and masks) in 2D or 3D.

    Channel 0 is the image, under the likelihood of the config; further channels are masks, Bernoulli each.
    `forward` gives the per-sample loss, which is what per-patient clipping needs: no term mixes two scans.
    """

    log_scale: Tensor
    progress: Tensor

    def __init__(self, space: ImageSpace, config: ModelConfig, linear: LinearPart | None = None) -> None:
        """Build the network; `config` must be resolved (no None left), see train/rule.py."""
        super().__init__()
        if config.latent_dim is None or config.channels is None:
            raise ConfigError("latent_dim and channels are not chosen yet: resolve the recipe first")
        self.space = space
        self.config = config
        self.latent_dim = config.latent_dim
        self.linear = linear
        # How much of DP-SGD is done, 0 to 1, for what is scheduled. Not a weight: it is no part of a release.
        self.register_buffer("progress", torch.ones(()), persistent=False)
        units, groups, field = config.residual_units, config.norm_groups, config.latent == "field"
        shape, widths = space.spatial_shape, config.channels
        self.encoder = Encoder(space.channels, shape, widths, units=units, groups=groups, attention=config.attention)
        grid = level_sizes(shape, len(widths))[-1]
        self.posterior: nn.Linear | nn.Conv2d | nn.Conv3d
        self.prior: NormalPrior | FieldPrior
        if field:
            convolution = nn.Conv2d if space.spatial_dims == 2 else nn.Conv3d
            self.posterior = convolution(widths[-1], 2 * config.field.channels, kernel_size=1)
            self.prior = FieldPrior(space.condition_width, grid, config.field)
        else:
            self.posterior = nn.Linear(self.encoder.features, 2 * self.latent_dim)
            self.prior = NormalPrior(space.condition_width, self.latent_dim)

        def decoder() -> Decoder:
            looks = {"attention": config.attention, "field": field}
            return Decoder(
                self.latent_dim,
                space.condition_width,
                space.channels,
                shape,
                widths,
                units=units,
                groups=groups,
                **looks,
            )

        self.decoder: Decoder | ClassDecoders = decoder()
        if config.class_decoders:
            first, classes = label_columns(space.conditions)
            self.decoder = ClassDecoders([decoder() for _ in range(classes)], first)
        # Fitted after training, in place of the prior that codes are drawn from: see build_model.
        self.code_prior: CodeMixture | CodeFlow | None = None
        self.critic = None
        if config.adversary:
            self.critic = Critic(space.channels, shape, widths, units=units, groups=groups)
        self.labels = None
        if config.semi_supervised:
            self.labels = Labels(self.encoder.features, space.conditions)
        self.register_buffer("log_scale", torch.tensor(math.log(config.scale)))
        self._initialise()

    def _initialise(self) -> None:
        with torch.no_grad():
            half = len(self.posterior.weight) // 2
            bias = torch.as_tensor(self.posterior.bias)
            bias[:half], bias[half:] = 0.0, INITIAL_LOG_VARIANCE
            if self.linear is None:
                # Distinct prior means from the start: else the code carries the class and the label is ignored.
                nn.init.normal_(self.prior.condition.weight, std=0.5)
                return
            nn.init.zeros_(self.prior.condition.weight)
            nn.init.zeros_(self.posterior.weight)
            for parameter in self.decoder.final_parameters():
                nn.init.zeros_(parameter)

    def encode(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each (B, d), of q(z | x, c)."""
        return self._codes(self.encoder.maps(x), x, condition)

    def _codes(self, maps: Tensor, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        flat = maps.flatten(1) if isinstance(self.posterior, nn.Linear) else maps
        mean, log_variance = (half.flatten(1) for half in self.posterior(flat).chunk(2, dim=1))
        if self.linear is not None:
            mean = mean + self.linear.encode(x, condition)
        return mean, log_variance.clamp(*LOG_VARIANCE_BOUNDS)

    def label_probabilities(self, x: Tensor) -> Tensor:
        """Return q(y | x), (B, classes), of a semi-supervised model, over its classes without the missing one.

        Raises ConfigError for another model.
        """
        if self.labels is None:
            raise ConfigError("the model has no classifier: train it with semi_supervised")
        return self.labels.log_probabilities(self.encoder(x)).exp()

    def _filled(self, condition: Tensor) -> Tensor:
        """Return conditions without missing labels: each stands for all classes in equal parts."""
        return condition if self.labels is None else self.labels.even(condition)

    def prior_mean(self, condition: Tensor) -> Tensor:
        """Return the mean (B, d) of p(z | c)."""
        return self.prior.mean(self._filled(condition))

    def kl_to_prior(self, mean: Tensor, log_variance: Tensor, condition: Tensor) -> Tensor:
        """Return KL(N(mean, diag exp(log_variance)) || p(z | c)) in nats, (B,)."""
        return self.prior.kl(mean, log_variance, self._filled(condition))

    def log_prior(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return log p(z | c) in nats, (B,)."""
        return self.prior.log_density(z, self._filled(condition))

    def prior_sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Return codes (B, d) of the prior from standard normal `noise` (B, d)."""
        return self.prior.sample(self._filled(condition), noise)

    def draw(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Return one image, or a shape's ramp, and its mask probabilities (B, C, *spatial) a row of conditions.

        It is the mean of p(x | z, c).

        The code comes from the prior that was fitted to codes, where there is one, else from the prior of training;
        where there is a mixture, from the codes of a draw of that. A decoder that was never trained adds nothing: it is
        not run then, and a mixture's draw is kept as it is, with what the codes would leave out of it.
        """
        trained = any(bool(p.any()) for p in self.decoder.final_parameters())
        if self.labels is not None:
            condition = self.labels.drawn(condition, generator)
        if self.code_prior is not None:
            codes = self.prior_mean(condition) + self.code_prior.sample(condition, generator)
            return self._mean(codes, condition, residual=trained)
        if self.linear is None or self.linear.mixture is None:
            noise = torch.randn(len(condition), self.latent_dim, generator=generator)
            return self._mean(self.prior_sample(condition, noise), condition, residual=trained)
        drawn = self.linear.draw(condition, generator)
        if trained:
            return self._mean(self.linear.codes(drawn), condition)
        return self.linear.expand(self.linear.mean_coefficients(condition) + drawn).clamp(0, 1)

    def _outputs(self, z: Tensor, condition: Tensor, *, residual: bool = True) -> tuple[Tensor, Tensor]:
        """Return the image output (B, 1, *spatial) on the likelihood's scale, and mask logits (B, M, *spatial).

        residual: whether the network is run; without it, the linear part stands alone.
        """
        base = torch.full((len(z), self.space.channels, *self.space.spatial_shape), 0.5, device=z.device)
        if self.linear is not None:
            base = self.linear.decode(z, condition)
        image, mask = base[:, :1], logit(base[:, 1:])
        if self.config.likelihood == "bernoulli":
            image = logit(image)
        if not residual:
            return image, mask
        added = self.decoder(z, self._filled(condition))
        return image + added[:, :1], mask + added[:, 1:]

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return images and mask probabilities (B, C, *spatial) in [0, 1]: the mean of p(x | z, c)."""
        mean = self._mean(z, condition)
        if self.linear is None:
            return mean
        shape = sharpened(mean[:, :1], self.space.spatial_dims)
        return torch.cat([torch.where(self.linear.two_valued, shape, mean[:, :1]), mean[:, 1:]], dim=1)

    def _mean(self, z: Tensor, condition: Tensor, *, residual: bool = True) -> Tensor:
        """Return what `decode` does, shapes as ramps.

        residual: whether the network adds to the linear part; one that was never trained adds nothing.
        """
        image, mask = self._outputs(z, condition, residual=residual)
        image = torch.sigmoid(image) if self.config.likelihood == "bernoulli" else image.clamp(0, 1)
        return torch.cat([image, torch.sigmoid(mask)], dim=1)

    def reconstruction(self, x: Tensor, z: Tensor, condition: Tensor) -> Tensor:
        """Return -log p(x | z, c) in nats, (B,), of shapes that of their ramps; masks are weighted by `mask_weight`."""
        image, mask = self._outputs(z, condition)
        density = LIKELIHOODS[self.config.likelihood]
        x = x if self.linear is None else self.linear.levels(x)
        nats = density(x[:, :1], image, self.log_scale).flatten(1).sum(1)
        if mask.shape[1]:
            nats = nats + self.config.mask_weight * bernoulli(x[:, 1:], mask, self.log_scale).flatten(1).sum(1)
        return nats

    def _divergence(self, kl: Tensor) -> Tensor:
        """Return what the KL term (B,) adds to the loss where training stands: see ModelConfig.schedule."""
        beta, schedule = self.config.beta, self.config.schedule
        if schedule == "capacity":
            return beta * (kl - self.config.capacity * self.progress).abs()
        return beta * kl * ((self.progress / ANNEALED).clamp(max=1) if schedule == "anneal" else 1.0)

    def elbo(self, x: Tensor, condition: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return per-sample "loss", "reconstruction" and "kl" in nats, each (B,).

        loss = reconstruction + beta kl (Higgins et al. 2017), with beta as scheduled; noise (B, d) standard normal.
        """
        return self.elbo_of(self.encode(x, condition), x, condition, noise)

    def elbo_of(
        self, posterior: tuple[Tensor, Tensor], x: Tensor, condition: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return what `elbo` does, for codes of a posterior (mean and log-variance, (B, d) each) that is given."""
        mean, log_variance = posterior
        z = mean + torch.exp(0.5 * log_variance) * noise
        reconstruction = self.reconstruction(x, z, condition)
        kl = self.kl_to_prior(mean, log_variance, condition)
        return {"loss": reconstruction + self._divergence(kl), "reconstruction": reconstruction, "kl": kl}

    def _semi_supervised(self, labels: Labels, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return the loss (B,) in nats of M2: scans are encoded once, and decoded as each class."""
        maps = self.encoder.maps(x)
        posterior = self._codes(maps, x, condition)
        as_class = [e.expand(len(x), -1) for e in torch.eye(labels.classes, device=x.device)]
        each = [self.elbo_of(posterior, x, labels.with_probabilities(condition, y), noise)["loss"] for y in as_class]
        return labels.loss(each, labels.log_probabilities(maps.flatten(1)), condition, self.config.label_weight)

    def log_weight(self, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x, z | c) - log q(z | x, c) at one draw of z, (B,): the weight of Burda et al. (2016)."""
        mean, log_variance = self.encode(x, condition)
        z = mean + torch.exp(0.5 * log_variance) * noise
        log_posterior = -0.5 * (noise.square() + log_variance + math.log(2 * math.pi)).sum(1)
        return self.log_prior(z, condition) - log_posterior - self.reconstruction(x, z, condition)

    def forward(self, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each scan, (B,): x (B, C, *spatial), condition (B, K), noise (B, d).

        The negative ELBO a channel element, or M2's loss where labels may be missing (nets/labels.py); with a critic,
        plus `adversary` times its cross-entropy on the scan and on one made for it from the prior with the same noise.
        """
        if self.labels is None:
            loss = self.elbo(x, condition, noise)["loss"]
        else:
            loss = self._semi_supervised(self.labels, x, condition, noise)
        loss = loss / x[0].numel()
        if self.critic is None:
            return loss
        made = self.decode(self.prior_sample(condition, noise), condition)
        return loss + self.config.adversary * self.critic.loss(x, made, 1.0)


def label_columns(conditions: tuple[Condition, ...]) -> tuple[int, int]:
    """Return where the first class condition starts in the encoded vector, and how many classes it has.

    Raises ConfigError where there is none.
    """
    start = 0
    for condition in conditions:
        if condition.kind == "class":
            return start, condition.width
        start += condition.width
    raise ConfigError("class_decoders needs a condition with classes: ingest with --condition NAME")
