// Writes reference.md from the declarations in dist, so that it says what the types say.
//
//     node scripts/reference.js           writes it
//     node scripts/reference.js --check   fails if it is not up to date
import { readFileSync, writeFileSync } from 'node:fs'
import ts from 'typescript'

const { name, exports } = JSON.parse(readFileSync('package.json', 'utf8'))
const entries = Object.entries(exports).filter(([, target]) => target.import)
const files = entries.map(([, target]) => target.import.types)

const program = ts.createProgram(files, { module: ts.ModuleKind.NodeNext, moduleResolution: ts.ModuleResolutionKind.NodeNext })
const checker = program.getTypeChecker()
const known = new Set()

/** What an entry point declares, and none before it, in the order of its sources. */
function declarationsOf (file) {
  const module = checker.getSymbolAtLocation(program.getSourceFile(file))
  return checker.getExportsOfModule(module)
    .map(symbol => ({
      name: symbol.name,
      target: symbol.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(symbol) : symbol
    }))
    .filter(({ target }) => target.declarations?.length > 0 && !known.has(target) && known.add(target))
}

/** A declaration with its comment, without what is private. */
function textOf (declaration) {
  const node = ts.isVariableDeclaration(declaration) ? declaration.parent.parent : declaration
  const source = node.getSourceFile().text
  const comments = ts.getLeadingCommentRanges(source, node.getFullStart()) ?? []
  const from = comments.findLast(({ pos }) => source.startsWith('/**', pos))?.pos ?? node.getStart()
  return source.slice(from, node.getEnd())
    .replace(/^(?: {4}#private;| {4}private .*;)\n/gm, '')
    .replace(/\b(?:export|declare) /g, '')
    .replace(/ {4}/g, '  ')
}

function sectionOf ([path, target]) {
  const declarations = declarationsOf(target.import.types)
    .map(({ name, target }) => `### ${name}\n\n\`\`\`ts\n${target.declarations.map(textOf).join('\n')}\n\`\`\`\n`)
  return `## ${name}${path.slice(1)}\n\n${declarations.join('\n')}`
}

const reference = `# Reference

Everything that the package exports, by entry point, as its types say it. Written by \`npm run reference\`.

${entries.map(sectionOf).join('\n')}`

if (process.argv[2] !== '--check') {
  writeFileSync('reference.md', reference)
} else if (readFileSync('reference.md', 'utf8') !== reference) {
  console.error('reference.md is not up to date: npm run reference')
  process.exit(1)
}
