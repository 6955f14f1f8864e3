//! Large memory spread over the nodes of a machine that has several, page by page in turn, so that every
//! thread reads from all of them at once and none waits for the one whose thread happened to write first.
//!
//! A system that has one node, does not know the calls or forbids them, as some containers do, goes on
//! without.

use memmap2::MmapMut;

/// Nodes that the process may take memory from: at most as many as a mask has bits.
pub fn n_nodes() -> usize {
    allowed().map_or(1, |nodes| nodes.count_ones() as usize)
}

/// Spreads pages that are not yet there over the process's nodes.
pub fn interleave(map: &MmapMut) {
    match allowed() {
        Some(nodes) if nodes.count_ones() > 1 => {
            let _ = spread(map, nodes);
        }
        _ => {}
    }
}

/// Bits of a mask: Linux on x86 has 1,024 nodes at most, machines with one CPU image have few.
type Nodes = u64;

#[cfg(target_os = "linux")]
mod system {
    use std::io;
    use std::ptr;

    use memmap2::MmapMut;

    use super::Nodes;

    /// linux/mempolicy.h.
    pub const MPOL_INTERLEAVE: libc::c_long = 3;
    const MPOL_F_MEMS_ALLOWED: libc::c_ulong = 4;
    /// The kernel takes one bit less than it is told.
    const MASK_BITS: libc::c_ulong = Nodes::BITS as libc::c_ulong + 1;
    /// What the kernel may write, whatever number of nodes it was built for.
    const MOST_WORDS: usize = 16;

    #[allow(unsafe_code, reason = "system calls")]
    pub fn allowed() -> Option<Nodes> {
        let mut nodes = [0 as Nodes; MOST_WORDS];
        // SAFETY: the kernel writes a mask of at most as many bits as there are.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                ptr::null_mut::<libc::c_int>(),
                nodes.as_mut_ptr(),
                Nodes::BITS as libc::c_ulong * MOST_WORDS as libc::c_ulong,
                ptr::null::<libc::c_void>(),
                MPOL_F_MEMS_ALLOWED,
            )
        };
        (failed == 0).then_some(nodes[0])
    }

    #[allow(unsafe_code, reason = "system calls")]
    pub fn spread(map: &MmapMut, nodes: Nodes) -> io::Result<()> {
        // SAFETY: the range is a mapping of ours, and where its pages will lie changes no byte of it.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                map.as_ptr(),
                map.len(),
                MPOL_INTERLEAVE,
                &raw const nodes,
                MASK_BITS,
                0 as libc::c_uint,
            )
        };
        if failed == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

#[cfg(target_os = "linux")]
use system::{allowed, spread};

#[cfg(not(target_os = "linux"))]
fn allowed() -> Option<Nodes> {
    None
}

#[cfg(not(target_os = "linux"))]
fn spread(_: &MmapMut, _: Nodes) -> std::io::Result<()> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// How the kernel says that pages of a mapping are to be placed.
    #[allow(unsafe_code, reason = "a system call")]
    fn policy_of(map: &MmapMut) -> libc::c_int {
        const MPOL_F_ADDR: libc::c_ulong = 2;
        let mut mode = -1;
        // SAFETY: the kernel writes one number.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut mode,
                std::ptr::null_mut::<u64>(),
                0 as libc::c_ulong,
                map.as_ptr(),
                MPOL_F_ADDR,
            )
        };
        assert_eq!(failed, 0, "{}", std::io::Error::last_os_error());
        mode
    }

    #[test]
    fn a_mapping_is_spread_over_the_nodes_that_there_are() {
        let mut map = MmapMut::map_anon(1 << 20).expect("a megabyte");
        let Some(nodes) = allowed() else {
            // Forbidden here, so nothing may come of it.
            assert_eq!(n_nodes(), 1);
            interleave(&map);
            map.fill(1);
            return;
        };
        assert!(nodes != 0, "the process has memory from somewhere");
        assert_eq!(n_nodes(), nodes.count_ones() as usize);
        // One node is spread over as well, where it is asked for.
        spread(&map, nodes).expect("nodes that the process may use");
        assert_eq!(libc::c_long::from(policy_of(&map)), system::MPOL_INTERLEAVE);
        map.fill(1);
        assert!(map.iter().all(|&byte| byte == 1));
    }

    #[test]
    fn a_node_that_there_is_not_is_an_error_and_nothing_more() {
        let Some(nodes) = allowed() else { return };
        let Some(missing) = (0..Nodes::BITS).find(|bit| nodes >> bit & 1 == 0) else {
            return;
        };
        let mut map = MmapMut::map_anon(1 << 12).expect("a page");
        assert!(spread(&map, 1 << missing).is_err());
        map.fill(1);
    }
}
