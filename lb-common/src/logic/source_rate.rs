//! How many new flows a source prefix may start: a token bucket for each.

use crate::abi::{Address, Service, SourceRate};

/// Thousandths of a new flow, so that slow rates fill evenly.
const TOKEN: u64 = 1000;

/// Tokens of a source that has rested.
#[inline(always)]
pub const fn full(service: &Service) -> u64 {
    service.new_flow_burst as u64 * TOKEN
}

/// Fills the bucket for the time that has passed and takes one new flow from it; `now` is in nanoseconds.
#[inline(always)]
pub const fn take(rate: &mut SourceRate, service: &Service, now: u64) -> bool {
    let passed = now.saturating_sub(rate.filled);
    // Whole microseconds, so that the product fits for any rate; a rest counts for an hour at most.
    let passed = if passed > HOUR { HOUR } else { passed } / 1000;
    let earned = passed * service.new_flow_rate as u64 / 1000;
    // A source that asks so often that nothing was earned since keeps the time that it has waited.
    if earned > 0 {
        let tokens = rate.tokens.saturating_add(earned);
        rate.tokens = if tokens > full(service) {
            full(service)
        } else {
            tokens
        };
        rate.filled = now;
    }
    if rate.tokens < TOKEN {
        return false;
    }
    rate.tokens -= TOKEN;
    true
}

const HOUR: u64 = 3_600_000_000_000;

/// The bits of a source address that the service's cap looks at; the others are 0.
#[inline(always)]
pub fn prefix(service: &Service, address: &Address) -> Address {
    let bits = if address.is_v4() {
        96 + service.rate_prefix_v4 as u32
    } else {
        service.rate_prefix_v6 as u32
    };
    let [a, b, c, d] = &address.0;
    Address([
        *a & mask(bits, 0),
        *b & mask(bits, 1),
        *c & mask(bits, 2),
        *d & mask(bits, 3),
    ])
}

/// The mask of one word of an address, in network byte order, where the first `bits` of the address count.
#[inline(always)]
const fn mask(bits: u32, word: u32) -> u32 {
    let before = word * 32;
    if bits >= before + 32 {
        u32::MAX
    } else if bits <= before {
        0
    } else {
        (u32::MAX << (32 - (bits - before))).to_be()
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn service(rate: u32, burst: u32) -> Service {
        Service {
            new_flow_rate: rate,
            new_flow_burst: burst,
            rate_prefix_v4: 24,
            rate_prefix_v6: 56,
            ..Service::default()
        }
    }

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_source_starts_its_burst_and_then_its_rate() {
        let service = service(10, 5);
        let mut rate = SourceRate {
            filled: SECOND,
            tokens: full(&service),
        };
        let mut started = |now| (0..100).filter(|_| take(&mut rate, &service, now)).count();
        assert_eq!(started(SECOND), 5);
        assert_eq!(started(SECOND + SECOND / 10), 1);
        assert_eq!(started(SECOND + SECOND / 2), 4);
        assert_eq!(started(SECOND * 60), 5, "no more than the burst after a rest");
        assert_eq!(started(SECOND * 59), 0, "a clock that goes back gives nothing");
    }

    #[test]
    fn a_source_that_asks_all_the_time_still_gets_its_rate() {
        let service = service(1, 1);
        let mut rate = SourceRate { filled: 0, tokens: 0 };
        let started = (0..10_000_u64)
            .filter(|tick| take(&mut rate, &service, tick * SECOND / 1000))
            .count();
        assert!((8..=10).contains(&started), "{started}");
    }

    #[test]
    fn no_rate_and_no_rest_overflow() {
        let service = service(u32::MAX, u32::MAX);
        let mut rate = SourceRate::default();
        assert!(take(&mut rate, &service, u64::MAX));
    }

    #[test]
    fn sources_of_one_prefix_count_together() {
        let service = service(1, 1);
        let prefix = |text: &str| {
            let ip: IpAddr = text.parse().unwrap();
            IpAddr::from(prefix(&service, &ip.into())).to_string()
        };
        assert_eq!(prefix("198.51.100.77"), "198.51.100.0");
        assert_eq!(prefix("2001:db8:1:2ff::9"), "2001:db8:1:200::");
    }
}
