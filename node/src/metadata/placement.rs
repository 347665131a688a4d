//! Where a new volume's replicas go: a pure function of the metadata, run by the leader.
//!
//! A mirror's replicas lie on distinct nodes. Mirror *m* begins *m* nodes further on, so that with more nodes than
//! replicas every node gets its share (RAID-1E over nodes) and with as many nodes each still has one of each
//! mirror. On a node the pool with the most space left, after everything already placed, is taken; equal ones in
//! the order of their names. A node whose pools are all too small is passed over while others are left.

use std::collections::BTreeMap;

use proto::cluster::{Refusal, VolumeSpec};
use proto::convert::check_name;
use proto::id::NodeId;
use proto::limits::{BLOCK_SIZE, MAX_MIRROR_SIZE, MAX_MIRRORS, MAX_REPLICAS};

/// Largest chunk: as much as one request of an initiator usefully spans.
pub const MAX_CHUNK: u32 = 16 << 20;

/// Bytes that may still be given to replicas, per node and pool.
pub type Space = BTreeMap<NodeId, BTreeMap<String, u64>>;

/// One mirror's size and its replicas' places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorPlan {
    /// Bytes.
    pub size: u64,
    /// On distinct nodes.
    pub places: Vec<(NodeId, String)>,
}

/// Checks what can be checked without knowing the cluster.
///
/// # Errors
/// [`Refusal::Invalid`] with the offending part.
pub fn check_spec(spec: &VolumeSpec) -> Result<(), Refusal> {
    check_name("volume name", &spec.name)?;
    let invalid = |what: &str, why: String| Err(Refusal::invalid(what, why));
    if spec.size == 0 {
        return invalid("size", "is 0".into());
    }
    if !spec.size.is_multiple_of(BLOCK_SIZE) {
        return invalid("size", format!("{} bytes is not a multiple of {BLOCK_SIZE}", spec.size));
    }
    if spec.replicas == 0 || spec.replicas as usize > MAX_REPLICAS {
        return invalid("replicas", format!("{} is not from 1 to {MAX_REPLICAS}", spec.replicas));
    }
    if spec.stripes == 0 || spec.stripes as usize > MAX_MIRRORS {
        return invalid("stripes", format!("{} is not from 1 to {MAX_MIRRORS}", spec.stripes));
    }
    let chunk = spec.chunk_size;
    if !chunk.is_power_of_two() || u64::from(chunk) < BLOCK_SIZE || chunk > MAX_CHUNK {
        return invalid("chunk size", format!("{chunk} is not a power of two from {BLOCK_SIZE} to {MAX_CHUNK}"));
    }
    if spec.min_in_sync == 0 || spec.min_in_sync > spec.replicas {
        return invalid("min-in-sync", format!("{} is not from 1 to {}", spec.min_in_sync, spec.replicas));
    }
    let largest = mirror_size(spec, 0);
    if largest > MAX_MIRROR_SIZE {
        return invalid("size", format!("a mirror would have {largest} bytes, at most {MAX_MIRROR_SIZE} are allowed"));
    }
    Ok(())
}

/// The bytes that the stripe puts into mirror `index`, up to a whole chunk, and one chunk at least.
pub fn mirror_size(spec: &VolumeSpec, index: u32) -> u64 {
    let chunk = u64::from(spec.chunk_size);
    let chunks = spec.size.div_ceil(chunk);
    let width = u64::from(spec.stripes);
    let mine = chunks / width + u64::from(u64::from(index) < chunks % width);
    mine.max(1).saturating_mul(chunk)
}

/// Places a volume's replicas.
///
/// # Errors
/// What [`check_spec`] refuses; [`Refusal::TooFewNodes`]; [`Refusal::NoSpace`] with the numbers.
pub fn place(spec: &VolumeSpec, space: &Space) -> Result<Vec<MirrorPlan>, Refusal> {
    check_spec(spec)?;
    let mut left: Vec<(NodeId, BTreeMap<String, u64>)> =
        space.iter().filter(|(_, pools)| !pools.is_empty()).map(|(id, pools)| (*id, pools.clone())).collect();
    let wanted = spec.replicas as usize;
    if left.len() < wanted {
        return Err(Refusal::TooFewNodes { wanted: spec.replicas, available: left.len() as u32 });
    }
    let mut plans = Vec::new();
    for index in 0..spec.stripes {
        let size = mirror_size(spec, index);
        let mut places = Vec::new();
        // With as many nodes as replicas the rotation changes the order only.
        let first = index as usize % left.len();
        for step in 0..left.len() {
            if places.len() == wanted {
                break;
            }
            let at = (first + step) % left.len();
            let (node, pools) = &mut left[at];
            let roomiest = pools.iter_mut().rev().max_by_key(|(_, free)| **free);
            let Some((pool, free)) = roomiest.filter(|(_, free)| **free >= size) else { continue };
            *free -= size;
            places.push((*node, pool.clone()));
        }
        if places.len() < wanted {
            let mut roomiest: Vec<u64> =
                left.iter().map(|(_, pools)| pools.values().copied().max().unwrap_or(0)).collect();
            roomiest.sort_unstable_by(|a, b| b.cmp(a));
            return Err(Refusal::NoSpace {
                place: format!(
                    "mirror {} of {} needs {wanted} nodes with a pool that can take it; the pool that would be taken",
                    index + 1,
                    spec.stripes
                ),
                wanted: size,
                available: roomiest[places.len().min(roomiest.len() - 1)..].first().copied().unwrap_or(0),
            });
        }
        plans.push(MirrorPlan { size, places });
    }
    Ok(plans)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(size: u64, replicas: u32, stripes: u32) -> VolumeSpec {
        VolumeSpec {
            name: "tank".into(),
            size,
            replicas,
            stripes,
            chunk_size: 256 << 10,
            min_in_sync: 1,
            write_cache: true,
            export: None,
        }
    }

    fn space(nodes: u64, pools: u64, bytes: u64) -> Space {
        (1..=nodes).map(|n| (NodeId(n), (1..=pools).map(|p| (format!("p{p}"), bytes)).collect())).collect()
    }

    #[test]
    fn five_mirrors_take_one_of_five_pools_each() {
        let plans = place(&spec(5 << 30, 3, 5), &space(3, 5, 2 << 30)).unwrap();
        assert_eq!(plans.len(), 5);
        for node in 1..=3 {
            let mut pools: Vec<_> = plans
                .iter()
                .map(|plan| plan.places.iter().find(|(id, _)| *id == NodeId(node)).unwrap().1.clone())
                .collect();
            pools.sort();
            assert_eq!(pools, ["p1", "p2", "p3", "p4", "p5"]);
        }
    }

    #[test]
    fn mirrors_rotate_over_more_nodes_than_replicas() {
        let plans = place(&spec(5 << 30, 3, 5), &space(5, 1, 8 << 30)).unwrap();
        let mut per_node = BTreeMap::new();
        for plan in &plans {
            let mut nodes: Vec<_> = plan.places.iter().map(|(node, _)| *node).collect();
            nodes.sort();
            nodes.dedup();
            assert_eq!(nodes.len(), 3, "distinct nodes");
            for node in nodes {
                *per_node.entry(node).or_insert(0) += 1;
            }
        }
        assert!(per_node.values().all(|count| *count == 3), "{per_node:?}");
    }

    #[test]
    fn mirrors_hold_every_chunk_of_the_stripe() {
        for (size, stripes) in [(4096, 5), (256 << 10, 1), ((256 << 10) * 7 + 4096, 5), (1 << 30, 3)] {
            let spec = spec(size, 3, stripes);
            let chunk = u64::from(spec.chunk_size);
            let sizes: Vec<u64> = (0..stripes).map(|index| mirror_size(&spec, index)).collect();
            for c in 0..size.div_ceil(chunk) {
                let (mirror, within) = (c % u64::from(stripes), c / u64::from(stripes));
                assert!((within + 1) * chunk <= sizes[mirror as usize], "chunk {c} of {size}");
            }
            assert!(sizes.iter().all(|size| size.is_multiple_of(chunk)));
        }
    }

    #[test]
    fn what_cannot_be_placed_is_refused_with_numbers() {
        let three = space(3, 5, 1 << 30);
        let refused = |spec: VolumeSpec, space: &Space| place(&spec, space).unwrap_err();
        assert_eq!(
            refused(spec(1 << 30, 3, 1), &space(2, 5, 2 << 30)),
            Refusal::TooFewNodes { wanted: 3, available: 2 }
        );
        assert!(matches!(
            refused(spec(6 << 30, 3, 5), &three),
            Refusal::NoSpace { wanted, available: 1073741824, .. } if wanted == (6u64 << 30).div_ceil(5 << 18) << 18
        ));
        for (bad, what) in [
            (spec(0, 3, 5), "size"),
            (spec(4097, 3, 5), "size"),
            (spec(u64::MAX - 4095, 3, 1), "size"),
            (spec(4096, 0, 5), "replicas"),
            (spec(4096, 6, 5), "replicas"),
            (spec(4096, 3, 0), "stripes"),
            (spec(4096, 3, 33), "stripes"),
            (VolumeSpec { chunk_size: 5000, ..spec(4096, 3, 5) }, "chunk size"),
            (VolumeSpec { min_in_sync: 4, ..spec(4096, 3, 5) }, "min-in-sync"),
            (VolumeSpec { name: "a/b".into(), ..spec(4096, 3, 5) }, "volume name"),
        ] {
            assert!(matches!(refused(bad, &three), Refusal::Invalid { what: found, .. } if found == what), "{what}");
        }
    }

    #[test]
    fn a_full_node_is_passed_over_while_others_are_left() {
        let mut four = space(4, 1, 1 << 30);
        four.get_mut(&NodeId(2)).unwrap().insert("p1".into(), 0);
        let plans = place(&spec(1 << 29, 3, 1), &four).unwrap();
        assert!(plans[0].places.iter().all(|(node, _)| *node != NodeId(2)));
    }
}
