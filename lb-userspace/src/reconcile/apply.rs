//! Makes the maps hold what they shall hold.

use std::io;

use super::{Scope, Step, Sweep, plan};
use crate::datapath::{Contents, Datapath, DatapathError, Operation};

/// The one place that changes maps: holds the data path and what it is known to hold.
#[derive(Debug)]
pub struct Reconciler<D> {
    datapath: D,
    actual: Contents,
}

/// What a reconciliation has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// How many; 0 when the maps were as they should be.
    pub operations: usize,
}

/// Why the maps are not what they shall be.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error("could not read what the maps hold")]
    Read(#[source] DatapathError),
    #[error("could not make change {number} of {total} to the maps; those before it are in place")]
    Apply {
        /// From 1 on.
        number: usize,
        total: usize,
        #[source]
        source: DatapathError,
    },
}

impl<D: Datapath> Reconciler<D> {
    /// Takes the data path over with what it holds.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn new(datapath: D) -> Result<Self, ReconcileError> {
        let actual = datapath.read().map_err(ReconcileError::Read)?;
        Ok(Self { datapath, actual })
    }

    /// What the maps hold as far as is known: what to compile from.
    pub fn actual(&self) -> &Contents {
        &self.actual
    }

    /// The data path, to read flows and counters from.
    pub fn datapath(&self) -> &D {
        &self.datapath
    }

    /// The data path, for what the reconciler does not govern.
    pub fn datapath_mut(&mut self) -> &mut D {
        &mut self.datapath
    }

    /// Makes the changes that lead to the desired contents, in an order that no packet suffers from.
    ///
    /// # Errors
    /// Stops at the first change that fails. What was done until then is known, so that calling again with the same
    /// or other desired contents goes on from there.
    pub fn reconcile(&mut self, desired: Contents) -> Result<Applied, ReconcileError> {
        let operations = plan(&self.actual, &desired);
        self.carry_out(&operations)?;
        if !operations.is_empty() {
            // What recording each of them would come to, in trees that are full.
            self.actual = desired;
        }
        Ok(Applied {
            operations: operations.len(),
        })
    }

    /// Makes these changes, which must be in such an order.
    ///
    /// # Errors
    /// As of [`Self::reconcile`].
    pub fn apply(&mut self, operations: &[Operation]) -> Result<Applied, ReconcileError> {
        self.carry_out(operations)?;
        self.record(operations);
        Ok(Applied {
            operations: operations.len(),
        })
    }

    /// Makes these changes to the maps; those before one that fails are recorded.
    fn carry_out(&mut self, operations: &[Operation]) -> Result<(), ReconcileError> {
        self.datapath.prepare(operations);
        let total = operations.len();
        for (index, operation) in operations.iter().enumerate() {
            match self.datapath.apply(operation) {
                Ok(()) => {}
                // Somebody else was quicker.
                Err(error) if is_removal(operation) && error.source.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    self.record(&operations[..index]);
                    self.datapath.prepare(&[]);
                    return Err(ReconcileError::Apply {
                        number: index + 1,
                        total,
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, operations: &[Operation]) {
        operations
            .iter()
            .for_each(|operation| self.actual.record(operation));
    }

    /// Reads anew what the maps hold and tells how many changes somebody else has made; compiling and reconciling
    /// after that mends them.
    ///
    /// # Errors
    /// When the maps cannot be read; what is known stays as it was.
    pub fn refresh(&mut self) -> Result<usize, ReconcileError> {
        let read = self.datapath.read().map_err(ReconcileError::Read)?;
        let changes = plan(&self.actual, &read).len();
        if changes > 0 {
            self.actual = read;
        }
        Ok(changes)
    }

    /// Begins to end the flows that are over and to count the others: see [`Sweep`].
    ///
    /// # Errors
    /// When the counts of live flows cannot be read.
    pub fn begin_sweep(&self, scope: &Scope) -> Result<Sweep, DatapathError> {
        Sweep::begin(&self.datapath, &self.actual, scope)
    }

    /// Goes on with a sweep by one step.
    ///
    /// # Errors
    /// When the flow table cannot be read or changed.
    pub fn sweep(&mut self, sweep: &mut Sweep) -> Result<Step, DatapathError> {
        sweep.step(&mut self.datapath, &self.actual)
    }
}

fn is_removal(operation: &Operation) -> bool {
    match operation {
        Operation::RemoveAddress(_)
        | Operation::RemoveBackend(_)
        | Operation::RemovePool(_)
        | Operation::RemoveService(_)
        | Operation::RemoveServiceKey(_)
        | Operation::RemoveFilter(..) => true,
        Operation::PutSettings(_)
        | Operation::PutAddress(..)
        | Operation::PutBackend(..)
        | Operation::PutPool(..)
        | Operation::PutService(..)
        | Operation::PutServiceKey(..)
        | Operation::PutFilter(..) => false,
    }
}
