//! The discipline that filters in front of the stack and behind it hang on, before Linux 6.6.

use futures_util::TryStreamExt;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};

use super::{NetError, Netlink};

const CLSACT: &str = "clsact";

/// Removes `clsact` from the interfaces on which nobody has a filter any more.
///
/// # Errors
/// The kernel does not tell, or refuses.
pub async fn remove_unused_clsact() -> Result<(), NetError> {
    let netlink = Netlink::open()?;
    let disciplines: Vec<TcMessage> = (netlink.handle.qdisc().get().execute())
        .try_collect()
        .await
        .map_err(|error| NetError::kernel("listing queueing disciplines", error))?;
    let is_clsact = |discipline: &TcMessage| {
        let mut attributes = discipline.attributes.iter();
        attributes.any(|attribute| matches!(attribute, TcAttribute::Kind(kind) if kind == CLSACT))
    };
    for discipline in disciplines.iter().filter(|discipline| is_clsact(discipline)) {
        let index = discipline.header.index;
        if netlink.has_filters(index).await? {
            continue;
        }
        let mut request = netlink.handle.qdisc().del(index);
        request.message_mut().header.parent = TcHandle::CLSACT;
        let removed = request.execute().await;
        removed
            .map_err(|error| NetError::kernel(format!("removing {CLSACT} from interface {index}"), error))?;
    }
    Ok(())
}

impl Netlink {
    async fn has_filters(&self, index: i32) -> Result<bool, NetError> {
        let filters = || self.handle.traffic_filter(index).get();
        for request in [filters().ingress(), filters().egress()] {
            let found: Vec<TcMessage> = (request.execute())
                .try_collect()
                .await
                .map_err(|error| NetError::kernel("listing filters", error))?;
            if !found.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
