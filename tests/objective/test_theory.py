"""The paper's theorems as experiments: random problems in float64, each statement written out slowly.

Numbers of theorems, lemmas and equations are the paper's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.cases import make_case

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Sections 2 and D: states with several sampled actions, advantages centred on the sample (66)


@dataclass
class Sampled:
    """Actions _A sampled `count` times in all; state, advantage and the chain with states alone."""

    state: Tensor
    count: Tensor
    advantage: Tensor
    hierarchy = fpo.Hierarchy((fpo.Stratum("state", fpo.Budget(1, 1)),), 1.0)

    @property
    def seen(self) -> Tensor:
        """n_s of the state of each action."""
        return torch.zeros(int(self.state.max()) + 1, dtype=F64).index_add_(0, self.state, self.count)[self.state]

    def centred(self, value: Tensor) -> Tensor:
        """`value` minus its mean over the samples of the state: (65) and (66)."""
        mean = torch.zeros_like(value).index_add_(0, self.state, self.count * value)[self.state] / self.seen
        return value - mean

    def tv(self, delta: Tensor) -> Tensor:
        """D_TV^(s) = (1 / 2 n_s) sum_a n(s, a) |Delta|, one per state."""
        states = int(self.state.max()) + 1
        return torch.zeros(states, dtype=F64).index_add_(0, self.state, self.count / (2 * self.seen) * delta.abs())

    def unit(self) -> tuple[Tensor, float]:
        """(69): the maximiser of a linear objective on the unit TV ball moves the best action against the worst; and
        cbar, the value of all states with weights n_s / N."""
        out, cbar = torch.zeros_like(self.advantage), 0.0
        for state in self.state.unique():
            at = (self.state == state).nonzero().squeeze(1)
            best, worst = at[self.advantage[at].argmax()], at[self.advantage[at].argmin()]
            out[best] += self.seen[best] / self.count[best]
            out[worst] -= self.seen[worst] / self.count[worst]
            share = self.seen[best] / self.count.sum()
            cbar += float(share * (self.advantage[best] - self.advantage[worst]))
        return out, cbar

    def radius(self, gamma: float) -> float:
        """delta_A = (1 - gamma) cbar / (8 gamma |A|_inf), Theorem D.3."""
        return (1 - gamma) * self.unit()[1] / (8 * gamma * float(self.advantage.abs().max()))

    def tv_trpo(self, delta: Tensor, gamma: float) -> float:
        """(67) without its constant, with the weights n_s / N."""
        gain = (self.count * delta * self.advantage).sum() / self.count.sum()
        penalty = 4 * gamma * self.advantage.abs().max() / (1 - gamma) ** 2 * self.tv(delta).max() ** 2
        return float(gain / (1 - gamma) - penalty)

    def tokens(self, value: Tensor) -> Tensor:
        """One entry per sample."""
        return value.repeat_interleave(self.count.long())

    @functools.cached_property
    def cells(self) -> fpo.Cells:
        return self.hierarchy.cells({"state": self.tokens(self.state)})

    def apc(self, delta: Tensor, radius: float) -> float:
        """APC-Obj (3) by the package."""
        weighted = self.tokens(self.advantage) / self.count.sum()
        log_ratio = self.tokens(delta).log1p()
        gating = fpo.Apc(radius, stratum="state")
        return fpo.surrogate(log_ratio, weighted, self.cells, self.hierarchy, gating=gating).value

    def censored(self, delta: Tensor, radius: float) -> Tensor:
        """C_delta (73) of every action, by the package: one token of each action tells."""
        log_ratio = self.tokens(delta).log1p()
        gated = fpo.gated_ratio(log_ratio, log_ratio, self.cells, fpo.Apc(radius, stratum="state"))
        first = self.count.long().cumsum(0) - self.count.long()
        return gated[first] - 1.0


def sample(seed: int, states: int = 4) -> Sampled:
    rng = generator(seed)
    actions = torch.randint(2, 5, (states,), generator=rng)
    state = torch.arange(states).repeat_interleave(actions)
    count = torch.randint(1, 4, state.shape, generator=rng).to(F64)
    problem = Sampled(state, count, torch.randn(state.shape, generator=rng, dtype=F64))
    problem.advantage = problem.centred(problem.advantage)
    return problem


def directions(problem: Sampled, seed: int) -> list[Tensor]:
    """Feasible ones: every exchange between two actions of a state, and random ones."""
    out = []
    for a, b in itertools.permutations(range(len(problem.state)), 2):
        if problem.state[a] == problem.state[b]:
            move = torch.zeros_like(problem.count)
            move[a], move[b] = 1.0 / problem.count[a], -1.0 / problem.count[b]
            out.append(move)
    rng = generator(seed)
    out += [problem.centred(torch.randn(problem.count.shape, generator=rng, dtype=F64)) for _ in range(40)]
    return out


@pytest.mark.parametrize("seed", range(6))
def test_theorem_d10_tv_trpo_and_apc_obj_give_the_same_update(seed: int):
    problem, gamma = sample(seed), 0.95
    unit, cbar = problem.unit()
    radius = problem.radius(gamma)
    best = radius * unit
    # TV-TRPO is concave, so that what no feasible direction improves is its maximum
    value = problem.tv_trpo(best, gamma)
    for direction in directions(problem, seed):
        for step in (1e-6, 1e-4, 1e-2):
            assert problem.tv_trpo(best + step * radius * direction, gamma) <= value + 1e-13
    # APC-Obj has it as its maximum, of value delta cbar, over ratios of any size
    assert problem.apc(best, radius * (1 + 1e-12)) == pytest.approx(radius * cbar, rel=1e-10)
    for direction in directions(problem, seed + 100):
        for scale in (0.1, 1.0, 5.0):
            assert problem.apc(best + scale * radius * direction, radius) < radius * cbar * (1 - 1e-9)
        assert problem.apc(0.2 * direction, radius) < radius * cbar


@pytest.mark.parametrize("seed", range(4))
def test_lemma_d9_censoring_retracts_into_the_ball(seed: int):
    problem, rng = sample(seed), generator(seed)
    outside = 0
    for _ in range(200):
        delta = problem.centred(torch.rand(problem.count.shape, generator=rng, dtype=F64) - 0.5)
        delta *= 1.2 * torch.rand((), generator=rng, dtype=F64)
        radius = 0.05 + 0.2 * float(torch.rand((), generator=rng))
        before = problem.tv(delta)
        after = problem.tv(problem.centred(problem.censored(delta, radius)))
        inside = before <= radius
        torch.testing.assert_close(after[inside], before[inside], rtol=1e-12, atol=1e-14)
        assert (after <= (2 * radius - before).clamp_min(0.0) + 1e-13)[~inside].all()
        assert (after < radius)[~inside].all(), "strict"
        outside += int((~inside).sum())
    assert 50 < outside < 750


def test_theorem_2_1_the_radius_vanishes_without_discount():
    problem = sample(2)
    unit, _ = problem.unit()
    last = math.inf
    for gamma in (0.5, 0.9, 0.99, 0.999, 0.9999):
        # the radius that maximises (67) along its own maximiser, by golden section
        low, high, golden = 0.0, 1.0, (math.sqrt(5) - 1) / 2
        for _ in range(200):
            a, b = high - golden * (high - low), low + golden * (high - low)
            if problem.tv_trpo(a * unit, gamma) > problem.tv_trpo(b * unit, gamma):
                high = b
            else:
                low = a
        radius = problem.radius(gamma)
        # the top is flat: found to the square root of the rounding error
        assert radius == pytest.approx(low, rel=1e-5)
        assert radius <= (1 - gamma) / (4 * gamma), "(76)"
        assert radius < last
        last = radius
        # so nothing moves: the map of that radius is 1 but for 2 n_s delta
        delta = problem.centred(torch.rand(problem.count.shape, generator=generator(1), dtype=F64))
        moved = problem.censored(0.5 * delta, radius).abs()
        assert (moved <= 2 * problem.seen * radius * (1 + 1e-9)).all()
    assert last < 1e-4


@pytest.mark.parametrize("eps", (0.002, 0.02))
def test_claim_3_5_the_clip_of_gspo_bounds_kl_and_tv(eps: float):
    # A trajectory that visits each state as often as the old policy takes each action: its sample is the expectation
    rng = generator(0)
    gating = fpo.Gspo(1 - math.exp(-eps), math.exp(eps) - 1, use_min=False)
    cells_of = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(1, 1)),), 1.0)
    kept = 0
    for trial in range(140):
        kl, tv, log_ratio = [], [], []
        for _ in range(3):
            count = torch.randint(1, 6, (4,), generator=rng)
            old = count.double() / count.sum()
            scale = 0.5 * math.sqrt(eps) * (1 + trial % 7)
            new = (old.log() + scale * torch.randn(4, generator=rng, dtype=F64)).softmax(0)
            log_ratio.append((new / old).log().repeat_interleave(count))
            kl.append(((old * (old / new).log()).sum(), count.sum()))  # (35)
            tv.append(((old - new).abs().sum() / 2, count.sum()))  # (34)
        ell = torch.cat(log_ratio)
        cells = cells_of.cells({"trajectory": torch.zeros(len(ell), dtype=torch.int64)})
        result = fpo.surrogate(ell, torch.ones(len(ell), dtype=F64), cells, cells_of, gating=gating)
        tokens = sum(n for _, n in kl)
        mean_kl, mean_tv = (float(sum(d * n for d, n in pairs) / tokens) for pairs in (kl, tv))
        assert -float(ell.mean()) == pytest.approx(mean_kl, abs=1e-12), "(49)"
        assert result.report.clipped == float(mean_kl > eps)
        if result.report.clipped == 0:
            assert mean_kl <= eps and mean_tv <= math.sqrt(eps / 2)
            kept += 1
    assert 20 < kept < 120


def test_claim_3_5_is_about_expectations():
    # on a sample, log-ratios that cancel are nothing to GSPO, whatever TV they show; FiberPO's channels see both
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1)),), 0.2)
    cells = hierarchy.cells({"trajectory": torch.zeros(2, dtype=torch.int64)})
    ell, weight = torch.tensor([1.0, -1.0], dtype=F64), torch.ones(2, dtype=F64)
    result = fpo.surrogate(ell, weight, cells, hierarchy, gating=fpo.Gspo(3e-4, 4e-4))
    assert result.value == 2.0 and result.report.clipped == 0 and result.report.tv == 0.5
    metrics = result.report.metrics()
    assert metrics["trajectory/pos/zeroed"] == metrics["trajectory/neg/zeroed"] == 1.0


# Section 4.5: first-order agreement, and which tokens a map couples

MAPS = {
    "fiberpo": (None, "domain"),
    "ppo": (fpo.PpoClip(0.2, 0.28), None),
    "ppo, no min": (fpo.PpoClip(0.2, 0.28, use_min=False), None),
    "gspo": (fpo.Gspo(0.03, 0.04), "trajectory"),
    "gspo, no min": (fpo.Gspo(0.03, 0.04, use_min=False), "trajectory"),
    "truly_ppo": (fpo.TrulyPpo(0.2, 0.3), None),
    "truly_ppo, no min": (fpo.TrulyPpo(0.2, 0.3, use_min=False), None),
    "apc": (fpo.Apc(0.05), "trajectory"),
    "apc, log": (fpo.Apc(0.05, space="log"), "trajectory"),
    "apc, groups": (fpo.Apc(0.05, stratum="prompt_group"), "prompt_group"),
}


def jacobian(gating, case, log_ratio: Tensor, sign: float) -> Tensor:
    """dG_i / d ell_j: the coefficients of the objective in which token i alone counts, with advantage `sign`."""
    cells = case.cells
    rows = []
    for unit in torch.eye(len(log_ratio), dtype=F64):
        result = fpo.surrogate(log_ratio, sign * unit, cells, case.hierarchy, gating=gating)
        rows.append(sign * result.coefficients)
    return torch.stack(rows)


@pytest.mark.parametrize("sign", (1.0, -1.0))
@pytest.mark.parametrize("name", MAPS)
def test_first_order_agreement_of_every_map(name: str, sign: float):
    case = make_case(3, 5, num=24)
    at_zero = jacobian(MAPS[name][0], case, torch.zeros_like(case.log_ratio), sign)
    live = case.mask.double()
    if not name.startswith("gspo"):
        assert torch.equal(at_zero, torch.diag(live))
        return
    # GSPO's is the mean over the trajectory: the identity on advantages that trajectories have as a whole
    row = case.labels["trajectory"]
    same = (row[:, None] == row[None, :]) * live[:, None] * live[None, :]
    torch.testing.assert_close(at_zero, same / same.sum(1, keepdim=True).clamp_min(1), rtol=1e-15, atol=0)
    advantage = torch.randn(3000, generator=generator(0), dtype=F64)[row]
    torch.testing.assert_close(advantage @ at_zero, advantage * live, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", MAPS)
def test_the_jacobian_is_block_diagonal_over_the_cells_that_a_map_couples(name: str):
    case = make_case(3, 9, 0.15, num=24)
    gating, stratum = MAPS[name]
    full = jacobian(gating, case, case.log_ratio, 1.0)
    row = torch.arange(24) if stratum is None else case.labels[stratum]
    inside = row[:, None] == row[None, :]
    assert (full[~inside] == 0).all()
    off = inside & ~torch.eye(24, dtype=torch.bool)
    assert bool((full[off] != 0).any()) == (stratum is not None)


# Section 4: FiberPO-Trajectory

REGIMES = ("pass_through", "rollback", "zeroed")


def sigma(x: Tensor, budget: float, slope: float) -> Tensor:
    """g^agg (10) in its compact form: clip(x, +-[(k + 1) C - k |x|]_+), with autograd."""
    room = torch.relu((slope + 1) * budget - slope * x.abs())
    return torch.where(x.abs() <= budget, x, x.sign() * torch.minimum(x.abs(), room))


def sigma_slope(x: float, budget: float, slope: float) -> float:
    return 1.0 if abs(x) <= budget else -slope if abs(x) < budget * (1 + 1 / slope) else 0.0


def fiberpo_trajectory(ell: Tensor, budgets: tuple[float, float], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """rhat_i = w^base r^res_i of one trajectory, (7)-(12), and u_i, v_i (14), (15)."""
    num = len(ell)
    label = torch.where(ell >= 0, 1.0, -1.0).to(F64)
    log_s = {side: (side * ell * (label == side)).sum() / num for side in (1, -1)}  # (9)
    base = torch.exp(sigma(log_s[1], budgets[0], num)) / torch.exp(sigma(log_s[-1], budgets[1], num))  # (8)
    own = torch.where(label > 0, log_s[1], log_s[-1])
    other = torch.where(label > 0, log_s[-1], log_s[1])
    low, high = math.exp(-eps), math.exp(eps)
    numerator = (torch.exp(ell) / torch.exp(own) ** label).clamp(low, high)  # (11), (12)
    denominator = (torch.exp(other) ** -label).clamp(low, high)
    return base * numerator / denominator, ell - label * own, -label * other


def equation_20(ell: Tensor, budgets: tuple[float, float], eps: float) -> Tensor:
    """d rhat_i / d r_j (20), entry by entry."""
    rhat, u, v = fiberpo_trajectory(ell, budgets, eps)
    num = len(ell)
    out = torch.zeros(num, num, dtype=F64)
    for i, j in itertools.product(range(num), repeat=2):
        label_i, label_j = (1 if ell[t] >= 0 else -1 for t in (i, j))
        log_s = sum(max(label_j * float(x), 0.0) for x in ell) / num
        inside_u, inside_v = float(abs(u[i]) <= eps), float(abs(v[i]) <= eps)
        shared = sigma_slope(log_s, budgets[0] if label_j > 0 else budgets[1], num)
        shared -= inside_u if label_i == label_j else inside_v
        out[i, j] = rhat[i] / math.exp(ell[j]) * (float(i == j) * inside_u + shared / num)
    return out


@pytest.mark.parametrize("eps", (0.02, 0.1, 0.5))
@pytest.mark.parametrize("regime", itertools.product(REGIMES, REGIMES), ids="-".join)
def test_equation_20_in_all_nine_regimes(regime: tuple[str, str], eps: float):
    budgets, num = (0.15, 0.09), 7
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(*budgets)),), eps)
    drift = [
        {"pass_through": 0.6 * c, "rollback": c * (1 + 0.4 / num), "zeroed": 1.5 * c}[name]
        for c, name in zip(budgets, regime, strict=True)
    ]
    rng = generator(3)
    size = 0.1 + torch.rand(num, generator=rng, dtype=F64)
    pos, neg = size[:4] / size[:4].sum(), size[4:] / size[4:].sum()
    ell = num * torch.cat([drift[0] * pos, -drift[1] * neg])
    other = 0.3 * torch.randn(5, generator=rng, dtype=F64)
    both = torch.cat([ell, other])
    cells = hierarchy.cells({"trajectory": torch.tensor([0] * num + [1] * 5)})
    alone = hierarchy.cells({"trajectory": torch.zeros(num, dtype=torch.int64)})
    report = fpo.surrogate(ell, torch.ones(num, dtype=F64), alone, hierarchy).report.metrics()
    for channel, name in zip(("pos", "neg"), regime, strict=True):
        assert report[f"trajectory/{channel}/{name}"] == 1.0

    expected = equation_20(ell, budgets, eps)
    by_autograd = torch.autograd.functional.jacobian(
        lambda r: fiberpo_trajectory(r.log(), budgets, eps)[0], ell.exp(), vectorize=False
    )
    torch.testing.assert_close(by_autograd, expected, rtol=1e-12, atol=1e-13)

    def rhat(ratio: Tensor) -> Tensor:
        return fpo.gated_log_ratio(ratio.log(), cells, hierarchy).exp()

    package = torch.autograd.functional.jacobian(rhat, both.exp())
    torch.testing.assert_close(package[:num, :num], expected, rtol=1e-12, atol=1e-13)
    assert (package[:num, num:] == 0).all() and (package[num:, :num] == 0).all(), "trajectories are independent"


@pytest.mark.parametrize(("drift", "advantage"), itertools.product((1, -1), (1.0, -1.0)))
def test_rollback_restores_where_the_advantage_has_the_sign_of_the_drift(drift: int, advantage: float):
    # 4.6: all tokens drift alike, so that u = v = 0 and L = g(M): c_j = -k y_j, against the gradient without the gate
    num, budget = 5, 0.1
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(budget, budget)),), 0.2)
    cells = hierarchy.cells({"trajectory": torch.zeros(num, dtype=torch.int64)})
    x = budget * (1 + 0.5 / num)
    ell, weight = torch.full((num,), drift * x, dtype=F64), torch.full((num,), advantage / num, dtype=F64)
    gated = drift * 0.5 * budget  # half of the window is used up
    coefficients = fpo.token_coefficients(ell, weight, cells, hierarchy)
    torch.testing.assert_close(coefficients, -num * weight * math.exp(gated), rtol=1e-12, atol=0)
    restores = torch.sign(coefficients[0]) == -drift
    assert bool(restores) == (advantage == drift)
    # beyond C* nothing of the common drift is left in the gradient
    zeroed = fpo.token_coefficients(2 * ell, weight, cells, hierarchy)
    assert zeroed.abs().max() < 1e-15


@pytest.mark.parametrize(("drift", "advantage"), itertools.product((1, -1), (1.0, -1.0)))
def test_truly_ppo_rolls_back_only_where_it_restores(drift: int, advantage: float):
    case = make_case(1, 0, num=1)
    ell, weight = torch.tensor([0.5 * drift], dtype=F64), torch.tensor([advantage], dtype=F64)
    result = fpo.surrogate(ell, weight, case.cells, case.hierarchy, gating=fpo.TrulyPpo(0.2, 0.3))
    factor = -0.3 if drift == advantage else 1.0
    assert result.coefficients.item() == pytest.approx(factor * advantage * math.exp(0.5 * drift), rel=1e-14)
    assert math.copysign(1, result.coefficients.item()) == -drift, "either way it pulls back"


# Sections 4 and 5: the operators, with explicit matrices


def gate(x: Tensor, budget: Tensor, slope: Tensor) -> Tensor:
    """(10), one entry after the other."""
    out = []
    for value, c, k in zip(x.tolist(), budget.tolist(), slope.tolist(), strict=True):
        size = abs(value)
        gated = size if size <= c else max((k + 1) * c - k * size, 0.0)
        out.append(math.copysign(gated, value))
    return torch.tensor(out, dtype=F64)


def projection(fine: list[int], coarse_of: Callable[[int], int], coarse: list[int]) -> Tensor:
    """The pushforward along a map of labels: [coarse, fine], a 1 where `fine` lies over `coarse`."""
    out = torch.zeros(len(coarse), len(fine), dtype=F64)
    for column, label in enumerate(fine):
        out[coarse.index(coarse_of(label)), column] = 1.0
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", (0.01, 0.1, 0.4))
def test_equation_4_fiber_bundle_gating_in_operator_form(seed: int, scale: float):
    case = make_case(1, seed, scale)
    stratum, eps = case.hierarchy.active[0], case.hierarchy.token_clip
    label = case.labels[stratum.name][case.mask].tolist()
    ell = case.log_ratio[case.mask]
    cells = sorted(set(label))
    push = projection(list(range(len(ell))), lambda i: label[i], cells)
    length = push.sum(1)
    length_i = push.T @ length
    lift = push.T / length  # (K b)(i) = b(tau(i)) / T_tau
    torch.testing.assert_close(push @ lift, torch.eye(len(cells), dtype=F64))  # reflecting
    log_rhat = torch.zeros_like(ell)
    for side, budget in ((1, stratum.budget.pos), (-1, stratum.budget.neg)):
        density = (side * ell).clamp_min(0.0) / length_i  # F
        base = push @ density
        residual = density - lift @ base
        assert (push @ residual).abs().max() < 1e-15
        gated_base = gate(base, torch.full_like(base, budget), length)
        gated_fiber = (length_i * residual).clamp(-eps, eps) / length_i
        log_rhat += side * length_i * (lift @ gated_base + gated_fiber)  # log of R
    expected = fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy)[case.mask]
    torch.testing.assert_close(log_rhat, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("depth", (1, 2, 3, 4))
@pytest.mark.parametrize("slope", [None, 0.3])
@pytest.mark.parametrize("scale", (0.01, 0.1, 0.4))
def test_equation_26_fibration_gating_hierarchy_in_operator_form(depth: int, slope: float | None, scale: float):
    case = make_case(depth, 20 + depth, scale, slope=slope)
    labels = [case.labels[stratum.name][case.mask].tolist() for stratum in case.hierarchy.active]
    labels.append(list(range(len(labels[0]))))  # X_N: the tokens
    ell = case.log_ratio[case.mask]
    spaces = [sorted(set(label)) for label in labels]
    pairs = zip(labels, spaces, strict=True)
    counts = [torch.tensor([float(label.count(x)) for x in space], dtype=F64) for label, space in pairs]
    push, lift = [], []  # pi_n and K_n, n = 1 .. N
    for n in range(1, depth + 1):
        above = dict(zip(labels[n], labels[n - 1], strict=True))
        push.append(projection(spaces[n], above.__getitem__, spaces[n - 1]))
        lift.append(push[-1].T * counts[n][:, None] / counts[n - 1])  # (K_n b)(x) = N_x / N_above b(above)
        torch.testing.assert_close(push[-1] @ lift[-1], torch.eye(len(spaces[n - 1]), dtype=F64))
    log_rhat = torch.zeros_like(ell)
    for channel, side in ((0, 1), (1, -1)):
        densities = [(side * ell).clamp_min(0.0)]
        for matrix in reversed(push):
            densities.insert(0, matrix @ densities[0])  # (25)
        for n, density in enumerate(densities):
            residual = density if n == 0 else density - lift[n - 1] @ densities[n - 1]
            if n == depth:
                gated = residual.clamp(-case.hierarchy.token_clip, case.hierarchy.token_clip)
            else:
                pair = case.hierarchy.active[n].budget
                budget = torch.full_like(density, (pair.pos, pair.neg)[channel])
                chosen = counts[n] if slope is None else torch.full_like(density, slope)
                gated = counts[n] * gate(residual / counts[n], budget, chosen)
            for matrix in lift[n:]:
                gated = matrix @ gated  # (24)
            log_rhat += side * gated
    expected = fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy)[case.mask]
    torch.testing.assert_close(log_rhat, expected, rtol=0, atol=1e-13)
