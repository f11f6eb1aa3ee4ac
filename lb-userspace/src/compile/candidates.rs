//! Which backends of a service new flows may be put on, and with which weights.

use super::maglev;
use crate::{
    config::{Backend, Service, WhenAllDown},
    model::Model,
};

/// A backend that new flows may be put on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What the table holds; has no influence on which slots the backend gets.
    pub id: u32,
    /// See [`maglev::identity`]; decides which slots the backend prefers.
    pub identity: u64,
    /// Share of the slots in proportion to the other candidates'; 0 gets none.
    pub weight: u32,
}

impl Candidate {
    pub(super) fn new(id: u32, model: &Model, backend: &Backend, weight: u32) -> Self {
        Self {
            id,
            identity: maglev::identity(model.seed, backend.address, backend.port.unwrap_or(0)),
            weight,
        }
    }
}

/// What new flows a backend gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) is_candidate: bool,
    /// In proportion to the other backends of the service.
    pub(super) weight: u32,
}

/// The share of each backend, in the order of the service's.
///
/// Backups take part only while no other backend is up, and what is down only if nothing is up and the service says
/// so. While a candidate starts slowly, all weights are in hundredths, so that a tenth of a weight of 1 is one too.
pub(super) fn shares(model: &Model, service: &Service) -> Vec<Share> {
    let is_usable = |backend: &Backend| model.is_usable(service, backend);
    let none_is_up = !service.backends.iter().any(is_usable);
    let primary_is_up = service
        .backends
        .iter()
        .any(|backend| !backend.backup && is_usable(backend));
    let is_candidate = |backend: &Backend| {
        if none_is_up {
            service.when_all_down == WhenAllDown::TryAll && model.is_enabled(service, backend)
        } else {
            is_usable(backend) && !(backend.backup && primary_is_up)
        }
    };
    let percent = |backend: &Backend| {
        let name = (service.name.clone(), backend.name.clone());
        model.ramps.get(&name).copied()
    };
    let is_ramping = service
        .backends
        .iter()
        .any(|backend| is_candidate(backend) && percent(backend).is_some());
    let weight = |backend: &Backend| {
        if is_ramping {
            backend
                .weight
                .saturating_mul(percent(backend).unwrap_or(100).clamp(1, 100))
        } else {
            backend.weight
        }
    };
    service
        .backends
        .iter()
        .map(|backend| Share {
            is_candidate: is_candidate(backend),
            weight: weight(backend),
        })
        .collect()
}
