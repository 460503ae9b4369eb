// Package merged shows in user space the tree that a stack of layers makes, and
// tells what changes when layers are taken off its top.
//
// How a layer says that it hides something is the business of its format:
// [Rules] look names up. What all formats share is here: the open layers,
// merged directories, and the comparison, whose cost grows with what the upper
// layers hold and not with the tree, because what lies in the same place in
// both trees is not looked at.
//
// Nothing here follows a symbolic link: what is looked up is always one
// component in an open directory. Nothing is mounted or changed. Layers that
// change meanwhile give errors or a mixture of both states, never a file from
// outside of them.
package merged
