//! What the daemon tells of itself and of the data path.

pub mod rates;
pub mod status;
