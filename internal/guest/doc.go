// Package guest runs test binaries on a distribution kernel inside QEMU, for
// everything the kernel of the host lacks: device mapper, project quotas, the
// OpenZFS module, an older overlay. It is used by one command:
//
//	go run ./internal/guest/cmd/vmtest [flags] PACKAGE...
//
// # What a run does
//
//  1. Packages. A private apt directory is filled from the Debian entries of
//     the sources this host already has; nothing is installed, no file of the
//     host is changed. The kernel image and the tools (mkfs, thin tools,
//     dmsetup, btrfs, busybox) are downloaded and unpacked into the cache.
//  2. OpenZFS, if asked for: the zfs-dkms sources are compiled against the
//     headers of exactly that kernel, unpacked aside, and kept by kernel and
//     zfs version. About 3 minutes on two cores, once.
//  3. Image. A cpio archive with the modules in load order, the tools with
//     the shared libraries they name, a static init (cmd/vminit), the test
//     binaries (go test -c) and the files of their package directories.
//  4. Boot, with KVM if a probe boot with it works, else by emulation.
//  5. Results. Init sends framed output over a virtio port; test2json turns
//     it into events. The run fails if a test fails, if a package ends
//     without its end marker, runs no test or runs out of time, or if the
//     kernel reports a bug. The kernel log goes to standard error then.
//
// # The cache
//
// LAYERFS_CACHE, or layerfs below the user's cache directory, holds packages,
// unpacked trees and modules, each keyed by version, so that a directory is
// either complete or absent (built aside, renamed). A lock file keeps two runs
// from filling it at once; guests themselves run in parallel freely. Versions
// are looked up again after a week or with -update. The cache may be deleted
// at any time.
//
// # What a test sees
//
// It is root in an ordinary mount namespace (pivot_root works), in the
// directory of its package, where the files of that directory and testdata
// are, with TMPDIR on /scratch, an ext4 file system with project quotas on a
// sparse disk. LAYERFS_DISK names a second, empty disk. LAYERFS_GUEST is 1.
// LAYERFS_REQUIRE is passed on: the list of backends that must not be skipped.
// Files left in LAYERFS_OUT are copied to the directory of the -out flag.
//
// # Times
//
// On two cores without KVM: 5 to 9 seconds from the start of QEMU until init
// speaks, half a second more for the scratch file system, 1 second to switch
// off. The first run takes some 20 seconds more for the packages. Emulated
// code runs 10 to 30 times slower than the host's.
//
// # Needs
//
// Linux on amd64 with go, qemu-system-x86_64, apt-get, dpkg-deb; gcc for -race,
// and with make for OpenZFS. No root. It is run from inside this module; -C
// names the directory of another module whose packages are tested.
package guest
