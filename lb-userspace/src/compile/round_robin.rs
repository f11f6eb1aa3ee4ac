//! The sequence of `round-robin`: weights as nginx spreads them ("smooth weighted round-robin").

use std::ops::Rem;

/// Turns of a round at most.
const MAX_LENGTH: u32 = 65_536;

/// Who gets new flows in turn, as indices of the weights, of which none is 0; after the last comes the first again.
///
/// With few members to a weight the turns of each are spread evenly. The order of members of the same weight is that of
/// the weights.
pub fn turns(weights: &[u32]) -> Vec<u16> {
    let weights = scaled(weights);
    let total: i64 = weights.iter().sum();
    let mut current = vec![0; weights.len()];
    let mut turns = Vec::with_capacity(total as usize);
    for _ in 0..total {
        let mut largest = 0;
        for (index, weight) in weights.iter().enumerate() {
            current[index] += weight;
            if current[index] > current[largest] {
                largest = index;
            }
        }
        current[largest] -= total;
        turns.push(largest as u16);
    }
    turns
}

/// Turns of a round.
pub fn length(weights: &[u32]) -> u32 {
    scaled(weights).iter().sum::<i64>() as u32
}

/// Turns of each in one round: in lowest terms, or as near to its share as [`MAX_LENGTH`] turns allow, and at least
/// one.
fn scaled(weights: &[u32]) -> Vec<i64> {
    let weights: Vec<u64> = weights.iter().map(|weight| u64::from(*weight)).collect();
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    let total: u64 = weights.iter().sum::<u64>() / divisor;
    if total <= u64::from(MAX_LENGTH) {
        return weights.iter().map(|weight| (weight / divisor) as i64).collect();
    }
    // Who would get less than one turn gets one, and the others share what is left.
    let mut turns = vec![0; weights.len()];
    let (mut left, mut sharing) = (u64::from(MAX_LENGTH), weights.iter().sum::<u64>());
    loop {
        let small: Vec<usize> = (0..weights.len())
            .filter(|index| turns[*index] == 0 && weights[*index] * left < sharing)
            .collect();
        if small.is_empty() {
            break;
        }
        for index in small {
            turns[index] = 1;
            left -= 1;
            sharing -= weights[index];
        }
    }
    // By the largest remainder.
    let mut rest: Vec<(u64, usize)> = Vec::new();
    let mut given = 0;
    for (index, weight) in weights.iter().enumerate().filter(|(index, _)| turns[*index] == 0) {
        rest.push((weight * left % sharing, index));
        given += weight * left / sharing;
    }
    for (_, index) in &rest {
        turns[*index] = (weights[*index] * left / sharing) as i64;
    }
    rest.sort_by(|(one, first), (other, second)| other.cmp(one).then(first.cmp(second)));
    for (_, index) in rest.iter().take((left - given) as usize) {
        turns[*index] += 1;
    }
    turns
}

/// The greatest number that divides both.
pub(super) fn gcd<T: Copy + Default + PartialEq + Rem<Output = T>>(a: T, b: T) -> T {
    if b == T::default() { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests;
